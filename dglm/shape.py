"""The shape of a distribution along its first principal axis, from what many chains have in mean.

Chains are independent of each other, so the spread between them gives the standard error of any
smooth function of their means, however autocorrelated each of them is: by the jackknife that
leaves out one chain at a time, which takes away the bias of order 1 / chains, too.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from samplers import Moments

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
        return jackknife(_skewness, self.powers)

    def excess_kurtosis(self) -> Estimate:
        r"""Return the excess kurtosis along the first axis, 0 for a Gaussian.

        .. math:: E[(u - \bar u)^4] / σ^4 - 3
        """
        return jackknife(_excess_kurtosis, self.powers)

    def negentropy(self) -> Estimate:
        r"""Return how far the distribution of u is from the Gaussian g of its mean and variance.

        .. math:: J = \mathrm{KL}(p ‖ g) = H(g) - H(p)

        in nats, p and g being the probabilities of the bins: a bound from below, less than
        1e-3 low for densities that are smooth on the scale of a tenth of a standard deviation.
        The error is up to a third too large where p is Gaussian, so that the estimate may be a
        little below 0, and too small where tails are much heavier than a Gaussian's, which those
        of p(z|x) with its Gaussian prior are not.
        """
        return jackknife(_negentropy, torch.cat([self.powers[:, :2], self.histogram], dim=1))

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
        worth = jackknife(_variance_ratio, features)
        return Estimate(len(mean) * worth.value, len(mean) * worth.standard_error)


def jackknife(statistic: Callable[[Tensor], Tensor], features: Tensor) -> Estimate:
    r"""Estimate a function of expectations from independent chains.

    .. math::
        \hat θ = C θ - (C - 1) \bar θ_{(\cdot)}, \quad
        \mathrm{SE}^2 = \tfrac{C - 1}{C} \sum_c (θ_{(c)} - \bar θ_{(\cdot)})^2

    Arguments:
        statistic: θ, from expectations (B, K, …) to (B, …).
        features: Each chain's estimates of the expectations, (C, K, …).

    Raises:
        ValueError: There are fewer than two chains.

    References:
        The jackknife, the bootstrap and other resampling plans (Efron, 1982), Chapters 2 and 3.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"errors from the spread between chains need at least 2, got {count}")
    mean = features.mean(dim=0, keepdim=True)
    others = statistic(mean + (mean - features) / (count - 1))
    centre = others.mean(dim=0)
    value = count * statistic(mean)[0] - (count - 1) * centre
    error = ((count - 1) / count * (others - centre).square().sum(dim=0)).sqrt()
    return Estimate(value, error)


def _skewness(powers: Tensor) -> Tensor:
    first, second, third = powers[:, 0], powers[:, 1], powers[:, 2]
    variance = second - first.square()
    return (third - 3 * first * second + 2 * first.pow(3)) / variance.pow(1.5)


def _excess_kurtosis(powers: Tensor) -> Tensor:
    first, second, third, fourth = powers.unbind(dim=1)
    variance = second - first.square()
    central = fourth - 4 * first * third + 6 * first.square() * second - 3 * first.pow(4)
    return central / variance.square() - 3


def _negentropy(features: Tensor) -> Tensor:
    first, second = features[:, :1], features[:, 1:2]
    # A bin that one chain alone has reached is empty without it, but for rounding.
    observed = features[:, 2:].clamp(min=0)
    std = (second - first.square()).sqrt()
    fitted = gaussian_bins(first, std).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.xlogy(observed, observed / fitted).sum(dim=1)


def gaussian_bins(mean: Tensor, std: Tensor) -> Tensor:
    """Return the probabilities of the bins under Gaussians, (B, bin), for (B, 1) each."""
    ends = (EDGES[1:-1] - mean) / std
    infinity = torch.full_like(mean, torch.inf)
    low, high = torch.cat([-infinity, ends], dim=1), torch.cat([ends, infinity], dim=1)
    # The smaller of both tails, as a difference of numbers near 1 would have no digits left.
    upper = torch.special.ndtr(-low) - torch.special.ndtr(-high)
    return torch.where(low > 0, upper, torch.special.ndtr(high) - torch.special.ndtr(low))


def _variance_ratio(features: Tensor) -> Tensor:
    mean, squared_mean, square = features.unbind(dim=1)
    return (square - mean.square()) / (squared_mean - mean.square())
