"""What a sampler's draws are worth on a target whose answers are known."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers import (
    RELEASE_CUTOFF,
    Chains,
    GaussianMixture,
    Kernel,
    Target,
    autocorrelation,
    ess_per_step,
    sample,
    summarise,
)

_REFERENCE_DRAWS = 200_000


@dataclass(frozen=True)
class Cost:
    """What a sampler's draws took.

    Args:
        gradients_per_step: Gradients of the energy for one step of one chain.
        seconds: Of all steps of all chains.
        training_gradients: Gradients for training or tuning, over all chains.
        training_seconds: Seconds of training or tuning.
    """

    gradients_per_step: float
    seconds: float
    training_gradients: int = 0
    training_seconds: float = 0.0


class Measured(NamedTuple):
    """One line of the table, and what its picture shows."""

    row: dict[str, Any]
    correlation: Tensor
    """Autocorrelation of x over lags, the mean over chains, (lags,)."""
    draws: Tensor
    """(chain, draw, dim)."""


class Reference:
    """A target's moments of x and x², in which autocorrelations are expressed."""

    def __init__(self, target: Target) -> None:
        squares = target.sample(_REFERENCE_DRAWS, torch.Generator().manual_seed(0)).square()
        self.target = target
        self.square_mean = squares.mean(dim=0)
        self.square_covariance = squares.T.cov()

    def efficiency(self, draws: Tensor) -> float:
        r"""Return the smaller effective sample size of one step, of x and of x².

        Of short runs (chain, draw, dim): where chains have not forgotten their start after half
        the run, with correlation ρ_K left, the sum over lags goes on as a geometric series,

        .. math:: \mathrm{ESS}^{-1} = 1 + 2 \sum_{t \leq K} ρ_t + \frac{2 r ρ_K}{1 - r},
            \quad r = (ρ_K / ρ_0)^{1 / K}

        since otherwise chains that never move would seem worth 1 / (2K).
        """
        moments = (
            (draws, self.target.mean, self.target.covariance),
            (draws.square(), self.square_mean, self.square_covariance),
        )
        return min(_continued(autocorrelation(*each).mean(dim=0)) for each in moments)

    def measure(self, sampler: str, settings: str, chains: Chains, cost: Cost) -> Measured:
        """Return the sampler's line of the table.

        The paper's effective sample size of one step is over lags up to half the run, with the
        released code's cut beside it; the same for x²; and the smallest of ArviZ's over the
        coordinates, of x and of x².
        """
        draws = chains.draws
        correlation = autocorrelation(draws, self.target.mean, self.target.covariance)
        ess, cut = ess_per_step(correlation), ess_per_step(correlation, RELEASE_CUTOFF)
        squares = draws.square()
        of_squares = ess_per_step(
            autocorrelation(squares, self.square_mean, self.square_covariance)
        )
        plain, squared = summarise(draws).worst(), summarise(squares).worst()
        smallest = float(torch.minimum(plain.ess_bulk, squared.ess_bulk)) / draws[..., 0].numel()
        row = {
            "sampler": sampler,
            "settings": settings,
            "ess": ess.value,
            "ess_standard_error": ess.standard_error,
            "ess_cut": cut.value,
            "ess_squares": of_squares.value,
            "min_coordinate_ess": smallest,
            "r_hat": float(torch.maximum(plain.r_hat, squared.r_hat)),
            "ess_per_gradient": ess.value / cost.gradients_per_step,
            "ess_squares_per_gradient": of_squares.value / cost.gradients_per_step,
            "min_coordinate_ess_per_gradient": smallest / cost.gradients_per_step,
            "ess_per_second": ess.value * draws[..., 0].numel() / cost.seconds,
            "acceptance": float(chains.acceptance.mean()),
            "diverging": float(chains.diverging.float().mean()),
            "num_chains": draws.shape[0],
            "num_steps": draws.shape[1],
            "gradients_per_step": cost.gradients_per_step,
            "seconds": cost.seconds,
            "training_gradients": cost.training_gradients,
            "training_seconds": cost.training_seconds,
        }
        return Measured(row, correlation.mean(dim=0), draws)


def mode_weights(
    kernel: Kernel, target: GaussianMixture, count: int, num_steps: int, generator: torch.Generator
) -> dict[str, list[float]]:
    """Return how often chains that all start in the first mode end in each, as columns of a row.

    One draw of each chain counts, so that the draws are independent.
    """
    start = target.centres[:1].float().expand(count, -1)
    draws = sample(kernel, target, start, 1, thin=num_steps, generator=generator).draws[:, 0]
    share = target.responsibilities(draws)
    error = share.std(dim=0) / count**0.5
    return {"mode_weights": share.mean(dim=0).tolist(), "mode_weights_error": error.tolist()}


def _continued(correlation: Tensor) -> float:
    total = 1 + 2 * float(correlation[1:].sum())
    first, last, lags = float(correlation[0]), float(correlation[-1]), len(correlation) - 1
    if last > 0.1:
        if last >= first:
            return 0.0
        total += 2 * last / math.expm1(math.log(first / last) / lags)
    return 1 / total if total > 0 else math.inf
