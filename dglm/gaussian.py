"""Gaussians with independent coordinates: the prior and the approximate posterior."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.random import standard_normal


def gaussian_log_prob(standardised: Tensor, log_std: Tensor | float = 0.0) -> Tensor:
    """Return the log density of a Gaussian with independent coordinates, summed over them.

    Arguments:
        standardised: (x - mean) / standard deviation, (B, D).
        log_std: Log standard deviations, (B, D) or one number.

    Returns:
        Log densities, (B,) nats.
    """
    return -(0.5 * standardised.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)


class DiagonalGaussian(NamedTuple):
    """N(mean, diag(std²)), one for each row."""

    mean: Tensor
    """(B, D)."""
    log_std: Tensor
    """(B, D)."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one point a row, (B, D), differentiable in the mean and the standard deviation."""
        return self.mean + self.log_std.exp() * standard_normal(self.mean, generator)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log density at z (B, D), (B,) nats."""
        return gaussian_log_prob((z - self.mean) * (-self.log_std).exp(), self.log_std)

    def entropy(self) -> Tensor:
        """Return the entropy of each row, (B,) nats."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(dim=-1)

    def variance(self) -> Tensor:
        """Return the variance of each coordinate, (B, D)."""
        return (2 * self.log_std).exp()
