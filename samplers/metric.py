"""What the jumps of a sampler in training are measured in."""

from typing import Literal

import torch
from torch import Tensor

from samplers.moments import Moments
from samplers.preconditioned import whitened

Metric = Literal["plain", "deviation", "covariance", "squares"]
"""Of the coordinates x themselves, or of coordinates that the moments of draws whiten."""


def check_spread(metric: Metric, draws: Tensor) -> None:
    """Check that the moments of draws (B, D) are something to measure in.

    Raises:
        ValueError: There are too few of them, or they lie in fewer than D dimensions.
    """
    count, dim = draws.shape
    enough = {"plain": 1, "deviation": 2}.get(metric, dim + 1)
    if count < enough:
        raise ValueError(
            f"the metric {metric!r} in {dim} dimensions needs at least {enough} chains, got {count}"
        )
    if metric != "plain" and not _is_spread(metric, draws):
        raise ValueError(f"the metric {metric!r} needs chains that start apart in all directions")


def _is_spread(metric: Metric, draws: Tensor) -> bool:
    if (draws == draws[0]).all(dim=0).any():  # rounding may hide it from the moments
        return False
    _, failure = torch.linalg.cholesky_ex(Moments.of(draws).covariance)
    return metric == "deviation" or not failure


def measured_jump(metric: Metric, moments: Moments, start: Tensor, proposal: Tensor) -> Tensor:
    """Return δ, (B,), the squared distance between points (B, D) in the units of the metric."""
    before, after = start, proposal
    if metric != "plain":
        factor = _factor(metric, moments.covariance)
        before, after = (whitened(each, moments.mean, factor) for each in (start, proposal))
    jump = (after - before).square().sum(dim=-1)
    if metric == "squares":
        # Half, because the square of a standard normal number has the variance 2.
        jump = jump + 0.5 * (after.square() - before.square()).square().sum(dim=-1)
    return jump


def _factor(metric: Metric, covariance: Tensor) -> Tensor:
    """Return standard deviations (D,), or L of the covariance L Lᵀ, (D, D)."""
    if metric == "deviation":
        return covariance.diagonal().sqrt()
    return torch.linalg.cholesky(covariance)
