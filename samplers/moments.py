"""Running mean and covariance of draws."""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean and covariance of the draws so far."""

    mean: Tensor
    """(D,)."""
    covariance: Tensor
    """(D, D)."""

    @classmethod
    def of(cls, draws: Tensor) -> "Moments":
        """Return the moments of draws (B, D), the covariance with denominator B."""
        mean = draws.mean(dim=0)
        centred = draws - mean
        return cls(mean, centred.T @ centred / len(draws))

    def mixed(self, other: "Moments", weight: float) -> "Moments":
        r"""Return the moments of the mixture (1 - w) · self + w · other.

        .. math:: Σ' = (1 - w) Σ_1 + w Σ_2 + w (1 - w) (μ_2 - μ_1)(μ_2 - μ_1)^\top

        With w = 1/n at the n-th of equally large batches these are the moments of all of them.
        """
        step = other.mean - self.mean
        between = weight * (1 - weight) * torch.outer(step, step)
        covariance = torch.lerp(self.covariance, other.covariance, weight) + between
        return Moments(self.mean + weight * step, covariance)
