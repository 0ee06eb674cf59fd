"""The shape of a distribution along its first principal axis, from what many chains have in mean.

Chains are independent of each other, so the spread between them gives the standard error of any
smooth function of their means, however autocorrelated each of them is.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.adaptation import Moments

EDGES = torch.linspace(-6, 6, 121, dtype=torch.float64)
"""Ends of the histogram's bins in standard deviations; the outer bins reach to infinity."""


class Estimate(NamedTuple):
    """A figure and its standard error, 0-d, or one for each coordinate, (D,)."""

    value: Tensor
    standard_error: Tensor


class PrincipalAxes(NamedTuple):
    """The two directions in which a distribution is widest, and its scale in all others."""

    mean: Tensor
    """(D,)."""
    std: Tensor
    """Standard deviations of the coordinates, (D,)."""
    directions: Tensor
    """Orthonormal rows, the widest first, (2, D); the largest coordinate of each is positive."""
    scale: Tensor
    """Standard deviations in these directions, (2,)."""

    @classmethod
    def of(cls, moments: Moments) -> "PrincipalAxes":
        """Return the axes of a distribution with the given mean and covariance, in float64.

        Raises:
            ValueError: There are fewer than two coordinates, or one does not vary.
        """
        mean, covariance = moments.mean.double(), moments.covariance.double()
        if len(mean) < 2:
            raise ValueError(f"principal axes need at least 2 coordinates, got {len(mean)}")
        if not (covariance.diagonal() > 0).all():
            raise ValueError("the draws of a coordinate are all equal: the chains did not move")
        variances, vectors = torch.linalg.eigh(covariance)
        directions = vectors[:, -2:].flip(1).T
        largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
        scale = variances[-2:].flip(0).sqrt()
        return cls(mean, covariance.diagonal().sqrt(), directions * largest.sign(), scale)

    def project(self, draws: Tensor) -> Tensor:
        """Return draws (…, D) along the two axes in standard deviations, (…, 2)."""
        return (draws.double() - self.mean) @ self.directions.T / self.scale


class ChainMeans(NamedTuple):
    """Means over the draws of each chain: their memory does not grow with its length."""

    powers: Tensor
    """Of u, u², u³ and u⁴, where u is the draw along the first principal axis, (chain, 4)."""
    histogram: Tensor
    """The share of draws in each bin of u, (chain, bin)."""
    coordinates: Tensor
    """Of y, y² and y⁴, where y are the standardised coordinates, (chain, 3, D)."""

    @classmethod
    def of(cls, axes: PrincipalAxes, draws: Tensor) -> "ChainMeans":
        """Return the means over draws (chain, draw, D)."""
        u = axes.project(draws)[..., 0].contiguous()
        powers = torch.stack([u.pow(power).mean(dim=1) for power in (1, 2, 3, 4)], dim=1)
        bins = torch.bucketize(u, EDGES[1:-1])
        histogram = u.new_zeros(len(u), len(EDGES) - 1)
        histogram.scatter_add_(1, bins, torch.full_like(u, 1 / u.shape[1]))
        y = (draws.double() - axes.mean) / axes.std
        coordinates = torch.stack([y.pow(power).mean(dim=1) for power in (1, 2, 4)], dim=1)
        return cls(powers, histogram, coordinates)

    def mixed(self, other: "ChainMeans", weight: float) -> "ChainMeans":
        """Return the means (1 - w) · self + w · other."""
        return ChainMeans(*(torch.lerp(*pair, weight) for pair in zip(self, other, strict=True)))

    def skewness(self) -> Estimate:
        r"""Return the skewness along the first axis.

        .. math:: E[(u - \bar u)^3] / σ^3
        """
        return between_chains(_skewness, self.powers)

    def excess_kurtosis(self) -> Estimate:
        r"""Return the excess kurtosis along the first axis, 0 for a Gaussian.

        .. math:: E[(u - \bar u)^4] / σ^4 - 3
        """
        return between_chains(_excess_kurtosis, self.powers)

    def effective_sample_size(self, power: int = 1) -> Estimate:
        r"""Return how many independent draws all chains together are worth, for each coordinate.

        .. math:: \mathrm{ESS} = C \operatorname{Var}(y) / \operatorname{Var}(\bar y_c)

        for C chains with means ȳ_c: no lags are cut off, unlike in estimates from the
        autocorrelation. It supposes that the chains have converged, which R̂ tells.

        Arguments:
            power: 1 for y, or 2 for y², which chains that jump from side to side do not flatter.
        """
        mean, square = self.coordinates[:, power - 1], self.coordinates[:, power]
        features = torch.stack([mean, mean.square(), square], dim=1)
        worth = between_chains(_variance_ratio, features)
        chains = len(mean) - 1  # as the variance of their means is taken around their own mean
        return Estimate(chains * worth.value, chains * worth.standard_error)


def between_chains(statistic: Callable[[Tensor], Tensor], features: Tensor) -> Estimate:
    r"""Estimate a smooth function of expectations from independent chains, by the delta method.

    .. math::
        \hat θ = θ(\bar f), \quad
        \mathrm{SE}^2 = \tfrac{1}{C (C - 1)} \sum_c (∇θ(\bar f) · (f_c - \bar f))^2

    Arguments:
        statistic: θ, from expectations (K, …) to (…), each from its own column.
        features: Each chain's estimates f_c of the expectations, (C, K, …).

    Raises:
        ValueError: There are fewer than two chains.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"errors from the spread between chains need at least 2, got {count}")
    mean = features.mean(dim=0)
    slope = torch.func.grad(lambda expectation: statistic(expectation).sum())(mean)
    influence = (slope * (features - mean)).sum(dim=1)
    return Estimate(statistic(mean), influence.std(dim=0) / count**0.5)


def _skewness(powers: Tensor) -> Tensor:
    first, second, third, _ = powers
    variance = second - first.square()
    return (third - 3 * first * second + 2 * first.pow(3)) / variance.pow(1.5)


def _excess_kurtosis(powers: Tensor) -> Tensor:
    first, second, third, fourth = powers
    variance = second - first.square()
    central = fourth - 4 * first * third + 6 * first.square() * second - 3 * first.pow(4)
    return central / variance.square() - 3


def _variance_ratio(features: Tensor) -> Tensor:
    mean, squared_mean, square = features
    return (square - mean.square()) / (squared_mean - mean.square())
