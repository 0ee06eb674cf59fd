"""Densities that can be drawn from exactly: what a target is, Gaussians and their mixtures."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samplers.random import standard_normal


class Target(nn.Module, ABC):
    """A density whose moments are known and that can be drawn from exactly.

    A target is called as an energy: ``target(x)`` is U(x) = -log p(x) + constant in nats, from
    (B, D) to (B,), in the type and on the device of x. ``target.to(device)`` spares a GPU the copy
    of its constants at every call.

    Arguments:
        mean: E x, (D,).
        covariance: Cov x, (D, D).
    """

    mean: Tensor
    """E x, (D,), float64 unless converted."""
    covariance: Tensor
    """Cov x, (D, D), float64 unless converted."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("covariance", covariance)

    @property
    def dim(self) -> int:
        """D, the coordinates of a point."""
        return len(self.mean)

    @abstractmethod
    def forward(self, position: Tensor) -> Tensor:
        """Return U at positions (B, D), in nats, (B,)."""

    @abstractmethod
    def _draw(self, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        """Turn standard normal numbers (B, D) into exact draws."""

    @torch.no_grad()
    def sample(
        self,
        count: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return independent exact draws, (count, D).

        Arguments:
            count: How many.
            generator: Of the draws, which are made on its device; without one, torch's own and
                the device of the target.
            dtype: Of the draws; without one, torch's default.
        """
        device = self.mean.device if generator is None else generator.device
        like = torch.empty(count, self.dim, dtype=dtype, device=device)
        return self._draw(standard_normal(like, generator), generator)


class GaussianTarget(Target):
    r"""A multivariate normal distribution.

    .. math:: U(x) = \tfrac{1}{2} (x - μ)^\top Σ^{-1} (x - μ)

    Arguments:
        mean: μ, (D,).
        covariance: Σ, (D, D).

    Raises:
        ValueError: Σ is not symmetric and positive definite.
    """

    whitening: Tensor
    coloring: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        mean, covariance = mean.double(), covariance.double()
        super().__init__(mean, covariance)
        variances, axes = torch.linalg.eigh(covariance)
        if not torch.allclose(covariance, covariance.mT) or variances.min() <= 0:
            raise ValueError("the covariance must be symmetric and positive definite")
        self.register_buffer("whitening", axes / variances.sqrt())
        self.register_buffer("coloring", (axes * variances.sqrt()).mT)

    def forward(self, position: Tensor) -> Tensor:
        """Return U at positions (B, D), in nats, (B,)."""
        white = (position - self.mean.to(position)) @ self.whitening.to(position)
        return 0.5 * white.square().sum(dim=-1)

    def _draw(self, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.mean.to(noise) + noise @ self.coloring.to(noise)


class GaussianMixture(Target):
    r"""A mixture of isotropic normal distributions.

    .. math:: U(x) = -\log \sum_k w_k σ_k^{-D} \exp\bigl(-‖x - μ_k‖^2 / 2σ_k^2\bigr)

    Arguments:
        centres: μ, (K, D).
        variances: σ², (K,).
        weights: w, (K,), of sum one; equal ones where not given.

    Raises:
        ValueError: A variance or weight is not positive, or the weights do not sum to one.
    """

    centres: Tensor
    variances: Tensor
    weights: Tensor

    def __init__(
        self,
        centres: Tensor | Sequence[Sequence[float]],
        variances: Tensor | Sequence[float],
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        centres = torch.as_tensor(centres, dtype=torch.float64)
        variances = torch.as_tensor(variances, dtype=torch.float64)
        equal = torch.full_like(variances, 1 / len(variances))
        weights = equal if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if variances.min() <= 0 or weights.min() <= 0 or abs(weights.sum() - 1) > 1e-6:
            raise ValueError("variances and weights must be positive, and the weights sum to one")
        mean = weights @ centres
        deviations = centres - mean
        between = (weights[:, None] * deviations).mT @ deviations
        super().__init__(mean, between + (weights @ variances) * torch.eye(len(mean)).to(mean))
        self.register_buffer("centres", centres)
        self.register_buffer("variances", variances)
        self.register_buffer("weights", weights)

    def forward(self, position: Tensor) -> Tensor:
        """Return U at positions (B, D), in nats, (B,)."""
        parts = self._log_parts(position)
        # Far away the parts are large, and the logarithm of a sum of exponentials near them is
        # rounded so that the weights in its gradient no longer sum to one: take it near zero.
        largest = parts.detach().amax(dim=-1, keepdim=True)
        return -((parts - largest).logsumexp(dim=-1) + largest[:, 0])

    def responsibilities(self, position: Tensor) -> Tensor:
        """Return p(k | x), the probabilities of the components given x, (B, K).

        Their mean over exact draws is the weights.
        """
        return self._log_parts(position).softmax(dim=-1)

    def _log_parts(self, position: Tensor) -> Tensor:
        variances, weights = self.variances.to(position), self.weights.to(position)
        squared = (position[:, None] - self.centres.to(position)).square().sum(dim=-1)
        return weights.log() - 0.5 * (self.dim * variances.log() + squared / variances)

    def _draw(self, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        weights = self.weights.to(noise)
        chosen = weights.multinomial(len(noise), replacement=True, generator=generator)
        scales = self.variances.to(noise).sqrt()[chosen]
        return self.centres.to(noise)[chosen] + scales[:, None] * noise
