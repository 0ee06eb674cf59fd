"""How much independent draws chains are worth: the paper's measure, ArviZ's, and a table."""

import time
import warnings
from collections.abc import Mapping
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from samplers.chains import Chains, draw_chains, still_chains
from samplers.energy import Counted, Energy
from samplers.kernel import Kernel

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


def summarise(draws: Tensor) -> Summary:
    """Return ArviZ's effective sample sizes, R̂ and Monte Carlo error of each coordinate.

    Call it with ``draws.square()`` too: chains that jump from side to side have a flattering
    effective sample size of x, and none of x².

    Arguments:
        draws: Of the chains, (chain, draw, D). A warning tells of chains that never move.

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
    draws = torch.as_tensor(draws)
    if draws.dim() != 3:
        raise ValueError(
            f"draws must have shape (chain, draw, dim), got {tuple(draws.shape)}: draws[None] is "
            "one chain of (draw, dim), draws[..., None] chains of numbers (chain, draw)"
        )
    still = still_chains(draws)
    if still.any() and not still.all():
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


class Efficiency(NamedTuple):
    """The worst bulk effective sample sizes and R̂ over coordinates, of x and of x²."""

    ess: float
    """Of x, independent draws a step."""
    ess_squares: float
    """Of x²: a chain that leaps from side to side has a large one of x and a small one of x²."""
    r_hat: float
    """The larger one; NaN where a coordinate never changes."""

    @property
    def worst(self) -> float:
        """The smaller effective sample size; 0 where nothing moves."""
        return float(np.nan_to_num(min(self.ess, self.ess_squares)))


def efficiency(draws: Tensor, num_suspects: int | None = None) -> Efficiency:
    """Return what a step is worth, and R̂, by ArviZ's formulas.

    Arguments:
        draws: (chain, draw, D).
        num_suspects: Look only at so many coordinates of x, and as many of x²: those with the
            largest autocorrelation from a draw to the next, among which the worst one is.
    """
    from arviz_stats.base import array_stats

    found = []
    for quantity in (draws.double(), draws.double().square()):
        suspects = _suspects(quantity, num_suspects) if num_suspects else slice(None)
        values = quantity[..., suspects].cpu().numpy()
        moves = np.ptp(values, axis=(0, 1)) > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            ess = array_stats.ess(values, method="bulk", chain_axis=0, draw_axis=1)
            r_hat = array_stats.rhat(values, chain_axis=0, draw_axis=1)
        found.append((np.where(moves, ess, np.nan).min(), np.where(moves, r_hat, np.nan).max()))
    steps = draws.shape[0] * draws.shape[1]
    (plain, r_hat), (squares, other) = found
    return Efficiency(float(plain / steps), float(squares / steps), float(np.maximum(r_hat, other)))


_SHOWN = {
    "ess_per_gradient": "ESS/gradient",
    "ess_per_second": "ESS/second",
    "ess": "x, a step",
    "ess_squares": "x², a step",
    "r_hat": "R̂",
    "acceptance": "acceptance",
    "diverging": "diverging",
    "stuck": "stuck",
}


def _suspects(draws: Tensor, count: int) -> Tensor:
    centred = draws - draws.mean(dim=(0, 1))
    together = (centred[:, 1:] * centred[:, :-1]).mean(dim=(0, 1))
    share = together / centred.square().mean(dim=(0, 1))
    return share.nan_to_num(torch.inf).topk(min(count, len(share))).indices


class Comparison(dict[str, list[Any]]):
    """A table of samplers, a row each: print it, or ``pandas.DataFrame(comparison)``.

    Its columns: sampler; ess_per_gradient and ess_per_second, the worst bulk effective sample size
    over coordinates, of x and of x², over what it cost; ess and ess_squares, the worst a step of
    each; r_hat, the largest; acceptance; diverging, the share of steps; stuck, how many chains
    never moved; gradients_per_step and seconds.
    """

    def add(
        self, sampler: str, chains: Chains, gradients_per_step: float, seconds: float
    ) -> Efficiency:
        """Add the row of a sampler from its chains, whichever library they are from."""
        found = efficiency(chains.draws)
        steps = chains.draws.shape[0] * chains.draws.shape[1]
        row = {
            "sampler": sampler,
            "ess_per_gradient": found.worst / gradients_per_step,
            "ess_per_second": found.worst * steps / seconds,
            "ess": found.ess,
            "ess_squares": found.ess_squares,
            "r_hat": found.r_hat,
            "acceptance": float(chains.acceptance.mean()),
            "diverging": float(chains.diverging.float().mean()),
            "stuck": int((chains.draws == chains.draws[:, :1]).flatten(1).all(dim=1).sum()),
            "gradients_per_step": gradients_per_step,
            "seconds": seconds,
        }
        for name, value in row.items():
            self.setdefault(name, []).append(value)
        return found

    def row(self, sampler: str) -> dict[str, Any]:
        """Return the row of a sampler."""
        place = self["sampler"].index(sampler)
        return {name: column[place] for name, column in self.items()}

    def __rich__(self) -> Table:
        table = Table(box=SIMPLE, title="ESS and R̂ of the worst coordinate, of x and of x²")
        table.add_column("sampler", overflow="fold")
        for name in _SHOWN.values():
            table.add_column(name, justify="right", no_wrap=True)
        for place, sampler in enumerate(self.get("sampler", [])):
            table.add_row(sampler, *(f"{self[name][place]:.3g}" for name in _SHOWN))
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def compare(
    kernels: Mapping[str, Kernel],
    energy: Energy,
    position: Tensor,
    num_draws: int = 1000,
    *,
    generator: torch.Generator | None = None,
) -> Comparison:
    """Run several kernels from the same start and return the table that tells them apart.

    A step costs as many gradients as it evaluates the energy. Compile the kernels that you would
    run compiled: a first step, which compiles, is not timed.

    Arguments:
        kernels: By name; they are not adapted.
        energy: U, from (chain, dim) to (chain,).
        position: Where the chains start, (chain, dim), at least 4 of them: best where a warm-up
            left them.
        num_draws: Steps of each chain.
        generator: Of the noise.

    Warns:
        UserWarning: Chains of some kernel have R̂ above 1.01, or an effective sample size of x² of
            less than a tenth of that of x.

    Example:
        >>> import torch
        >>> from samplers import HMC, compare
        >>> energy = lambda x: 0.5 * x.square().sum(dim=-1)
        >>> kernels = {"short": HMC(1, 1.0), "long": HMC(3, 0.7)}
        >>> table = compare(kernels, energy, torch.randn(50, 2), num_draws=200)
        >>> table["sampler"]
        ['short', 'long']
    """
    table = Comparison()
    for name, kernel in kernels.items():
        counted, throwaway = Counted(energy), torch.Generator(position.device)
        state = kernel.init(position, energy)
        copy(kernel).step(state, counted, kernel.noise(state, throwaway))  # not compiled
        draw_chains(kernel, energy, position, kernel.steps_per_call, generator=throwaway)
        gradients = counted.count / len(position)
        began = time.perf_counter()
        chains = draw_chains(kernel, energy, position, num_draws, generator=generator)
        table.add(name, chains, gradients, time.perf_counter() - began)
    warn_of_misleading(table)
    return table


def warn_of_misleading(table: Comparison) -> None:
    """Warn, once for a table, of chains whose effective sample size should not be believed."""
    apart, leaping = [], []
    for name, r_hat, ess, squares in zip(
        *(table[column] for column in ("sampler", "r_hat", "ess", "ess_squares")), strict=True
    ):
        if not r_hat <= 1.01:
            apart.append(f"{name} ({r_hat:.2f})")
        if squares < 0.1 * ess:
            leaping.append(name)
    told = []
    if apart:
        told.append(
            f"chains do not agree, R̂ > 1.01, of {', '.join(apart)}: effective sample sizes mean "
            "nothing there; warm up or run longer, and start in every mode that you know of"
        )
    if leaping:
        told.append(
            f"the spread mixes ten times more slowly than the centre in chains of "
            f"{', '.join(leaping)}, which leap from side to side: believe the worst of x and x²"
        )
    if told:
        warnings.warn("; ".join(told), stacklevel=3)
