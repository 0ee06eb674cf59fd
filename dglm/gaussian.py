"""Gaussians, one for each observation: the prior, approximate posteriors, fitted ones."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from samplers import State
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

    def value_and_gradient(self, position: Tensor) -> State:
        """Return -log density and its gradient at positions (B, D)."""
        precision = (-2 * self.log_std).exp()
        # Around the mean: the squares of a narrow Gaussian, expanded, would cancel in float32.
        gradient = precision * (position - self.mean)
        squares = torch.linalg.vecdot(position - self.mean, gradient)
        constant = self.log_std.sum(dim=-1) + 0.5 * math.log(2 * math.pi) * position.shape[1]
        return State(position, 0.5 * squares + constant, gradient)

    def double(self) -> "DiagonalGaussian":
        """Return it in float64."""
        return DiagonalGaussian(self.mean.double(), self.log_std.double())


class DenseGaussian(NamedTuple):
    """N(μ, L Lᵀ), one for each image, and coordinates w = L⁻¹(z - μ) in which it is N(0, I).

    Positions are (n · C, D), the C chains of each of the n images one after another.
    """

    mean: Tensor
    """μ, (n, D)."""
    factor: Tensor
    """L, lower triangular with a positive diagonal, (n, D, D)."""

    def whiten(self, z: Tensor) -> Tensor:
        """Return w = L⁻¹(z - μ)."""
        centred = self._by_image(z) - self.mean[:, None]
        solved = torch.linalg.solve_triangular(self.factor.mT, centred, upper=True, left=False)
        return solved.reshape(z.shape)

    def colour(self, w: Tensor) -> Tensor:
        """Return z = μ + L w."""
        return torch.baddbmm(self.mean[:, None], self._by_image(w), self.factor.mT).view_as(w)

    def pull(self, gradient: Tensor) -> Tensor:
        """Return the gradient in w, Lᵀ times that in z."""
        return torch.bmm(self._by_image(gradient), self.factor).view_as(gradient)

    def log_determinant(self) -> Tensor:
        """Return log |L|, (n,)."""
        return self.factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)

    def variance(self) -> Tensor:
        """Return the variance of each coordinate of z, (n, D)."""
        return self.factor.square().sum(dim=2)

    def _by_image(self, rows: Tensor) -> Tensor:
        return rows.view(len(self.mean), -1, rows.shape[1])


class UnitMixture(NamedTuple):
    """K Gaussians of unit variance in equal shares for each of n images.

    Positions are (n · C, D), the C chains of each image one after another.
    """

    centres: Tensor
    """(n, K, D)."""
    chains: int
    """C."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one point a chain, (n · C, D), the Gaussians taken in turn from a random one on."""
        images, count, dim = self.centres.shape
        like = self.centres
        offset = torch.rand(images, 1, generator=generator, dtype=like.dtype, device=like.device)
        turns = (torch.arange(self.chains, device=like.device) + offset) * (count / self.chains)
        own = turns.long().clamp(max=count - 1)
        centre = like.gather(1, own[:, :, None].expand(-1, -1, dim)).flatten(0, 1)
        return centre + standard_normal(centre, generator)

    def value_and_gradient(self, position: Tensor) -> State:
        """Return -log density and its gradient at positions (n · C, D)."""
        images, count, dim = self.centres.shape
        away = position.view(images, -1, 1, dim) - self.centres[:, None]
        logits = -0.5 * away.square().sum(dim=-1)
        constant = 0.5 * math.log(2 * math.pi) * dim + math.log(count)
        energy = constant - logits.logsumexp(dim=-1)
        gradient = (logits.softmax(dim=-1)[..., None] * away).sum(dim=2)
        return State(position, energy.flatten(), gradient.view_as(position))

    def double(self) -> "UnitMixture":
        """Return it in float64."""
        return UnitMixture(self.centres.double(), self.chains)


def shrunk_covariance(draws: Tensor) -> Tensor:
    r"""Return the covariance of few draws in many dimensions, shrunk to a sphere.

    .. math:: (1 - ρ) C + ρ \tfrac{\operatorname{tr} C}{D} I, \quad
        ρ = \min\Bigl(1, \frac{\operatorname{tr} C^2 + \operatorname{tr}^2 C}
            {(S + 1) (\operatorname{tr} C^2 - \operatorname{tr}^2 C / D)}\Bigr)

    with the covariance C of the draws around their mean.

    Arguments:
        draws: S of each of n sets, (n, S, D).

    Returns:
        Covariances, (n, D, D).

    References:
        Shrinkage algorithms for MMSE covariance estimation (Chen, Wiesel, Eldar and Hero, 2010),
        without the terms of 2/D, as in scikit-learn.
    """
    count, dim = draws.shape[1:]
    away = draws - draws.mean(dim=1, keepdim=True)
    covariance = away.mT @ away / count
    squares = covariance.square().sum(dim=(1, 2))
    trace = covariance.diagonal(dim1=1, dim2=2).sum(dim=1)
    excess = squares - trace.square() / dim
    share = (squares + trace.square()) / ((count + 1) * excess)
    sphere = (trace / dim)[:, None, None] * torch.eye(dim).to(covariance)
    return torch.lerp(covariance, sphere, share.nan_to_num(1.0).clamp(0, 1)[:, None, None])
