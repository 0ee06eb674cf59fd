"""How much independent draws chains are worth: the paper's measure, and ArviZ's."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from samplers.chains import Chains, still_chains

RELEASE_CUTOFF = 0.05
"""The paper's released code leaves autocorrelations below this out of its sum."""

_BLOCK = 2**22


class ESSPerStep(NamedTuple):
    """The paper's effective sample size of one Metropolis-Hastings step."""

    value: float
    """Independent draws that one step is worth; above 1 for antithetic chains."""
    standard_error: float
    """From the spread between chains."""


class Summary(NamedTuple):
    """ArviZ's diagnostics of each coordinate, (D,), or after :meth:`worst` of the worst."""

    ess_bulk: Tensor
    """Effective sample size of the ranks: of the centre of the distribution."""
    ess_tail: Tensor
    """The smaller effective sample size of the 5 % and 95 % quantiles."""
    r_hat: Tensor
    """Rank-normalized split R̂, 1 where all chains agree; NaN for a single chain."""
    mcse: Tensor
    """Monte Carlo standard error of the mean."""

    def worst(self) -> "Summary":
        """Return the smallest ESS, the largest R̂ and the largest MCSE over coordinates, 0-d."""
        return Summary(self.ess_bulk.min(), self.ess_tail.min(), self.r_hat.max(), self.mcse.max())


def autocorrelation(
    draws: Tensor, mean: Tensor, covariance: Tensor, num_lags: int | None = None
) -> Tensor:
    r"""Return each chain's autocorrelations about the known mean.

    .. math:: ρ_t = \frac{1}{(N - t) \operatorname{Tr} Σ} \sum_{n} (x_n - μ)^\top (x_{n + t} - μ)

    The paper's ρ_t is the mean of this over chains. It is not forced to 1 at t = 0, so that
    chains that are narrower than the target, or off its centre, do not look well mixed.

    Arguments:
        draws: x, (chain, draw, D).
        mean: μ, of the target, (D,).
        covariance: Σ, of the target, (D, D).
        num_lags: The largest t; without it, half the length of the chains.

    Returns:
        ρ_0, ρ_1, …, float64 on the device of the draws, (chain, num_lags + 1).

    Raises:
        ValueError: The chains are not longer than ``num_lags``, or shorter than 2.
    """
    _, length, dim = draws.shape
    num_lags = length // 2 if num_lags is None else num_lags
    if not 1 <= num_lags < length:
        raise ValueError(f"lags up to {num_lags} need longer chains than {length} draws")
    centre, total_variance = mean.to(draws).double(), covariance.to(draws).double().trace()
    padded = length + num_lags  # No lag up to num_lags wraps round.
    blocks = draws.split(max(1, _BLOCK // (padded * dim)))
    sums = torch.cat([_lagged_products(x.double() - centre, padded) for x in blocks])
    pairs = length - torch.arange(num_lags + 1, device=draws.device)
    return sums[:, : num_lags + 1] / (pairs * total_variance)


def _lagged_products(centred: Tensor, padded: int) -> Tensor:
    spectrum = torch.fft.rfft(centred, n=padded, dim=1)
    power = spectrum.real.square() + spectrum.imag.square()
    return torch.fft.irfft(power.sum(dim=-1), n=padded, dim=1)


def ess_per_step(autocorrelation: Tensor, cutoff: float | None = None) -> ESSPerStep:
    r"""Return the paper's effective sample size of one step.

    .. math:: \mathrm{ESS} = \frac{1}{1 + 2 \sum_{t \geq 1} ρ_t}

    All lags count. The paper's released code keeps those with ρ_t > 0.05 only, which flatters:
    pass ``cutoff=RELEASE_CUTOFF`` for its figures. The error of the full sum grows with the
    number of lags: of half the run, 10 % for 200 chains of a target with one wide axis.

    Arguments:
        autocorrelation: As returned by :func:`autocorrelation`, (chain, lag) from lag 0.
        cutoff: Lags whose ρ_t, averaged over chains, is not above this are left out.

    Returns:
        The value and its standard error; NaN where the sum says 1 / ESS ≤ 0, that is, where there
        are too few chains for so antithetic a kernel.

    References:
        Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
        Sohl-Dickstein, 2018), Section 5.1.
    """
    lags = autocorrelation[:, 1:]
    if cutoff is not None:
        lags = lags[:, lags.mean(dim=0) > cutoff]
    inverse = 1 + 2 * lags.sum(dim=1)
    mean = float(inverse.mean())
    if not mean > 0:
        return ESSPerStep(float("nan"), float("nan"))
    error = float(inverse.std()) / len(inverse) ** 0.5 if len(inverse) > 1 else float("nan")
    return ESSPerStep(1 / mean, error / mean**2)


def summarise(draws: Tensor | Chains) -> Summary:
    """Return ArviZ's effective sample sizes, R̂ and Monte Carlo error of each coordinate.

    Call it with ``draws.square()`` too: chains that jump from side to side have a flattering
    effective sample size of x, and none of x².

    Arguments:
        draws: Of the chains, (chain, draw, D), or what :func:`sample` returns. A warning tells of
            chains that never move.

    Returns:
        Float64, on the CPU. A coordinate that never changes anywhere has NaN throughout, where
        ArviZ would call every draw effective.

    Raises:
        ValueError: The draws have another shape.

    References:
        Rank-normalization, folding, and localization: an improved R̂ for assessing convergence of
        MCMC (Vehtari, Gelman, Simpson, Carpenter and Bürkner, 2021).

    Example:
        >>> import torch
        >>> from samplers import summarise
        >>> independent = torch.randn(4, 500, 2, generator=torch.Generator().manual_seed(0))
        >>> bool((summarise(independent).ess_bulk > 1000).all())
        True
    """
    draws = torch.as_tensor(draws.draws if isinstance(draws, Chains) else draws)
    if draws.dim() != 3:
        raise ValueError(
            f"draws must have shape (chain, draw, dim), got {tuple(draws.shape)}: draws[None] is "
            "one chain of (draw, dim), draws[..., None] chains of numbers (chain, draw)"
        )
    still = still_chains(draws)
    if still.any():
        warnings.warn(
            f"{int(still.sum())} of {len(still)} chains never move: their draws are no draws of "
            "the target, and spoil what is estimated from all",
            stacklevel=2,
        )
    values = draws.double().cpu().numpy()
    moves = np.ptp(values, axis=(0, 1)) > 0
    # Here, as pandas and xarray come with it: half a second that most commands need not wait.
    from arviz_stats.base import array_stats

    axes = {"chain_axis": 0, "draw_axis": 1}
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (
            array_stats.ess(values, method="bulk", **axes),
            array_stats.ess(values, method="tail", prob=(0.05, 0.95), **axes),
            array_stats.rhat(values, **axes),
            array_stats.mcse(values, method="mean", **axes),
        )
    return Summary(*(torch.as_tensor(np.where(moves, field, np.nan)) for field in found))
