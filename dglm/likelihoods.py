"""Observation models p(x|z), given what the decoder makes of z."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dglm.gaussian import gaussian_log_prob
from samplers.random import standard_normal


class Likelihood(nn.Module, ABC):
    """A distribution of observations (B, N), independent over N, given parameters (B, N)."""

    @abstractmethod
    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Return log p(x | parameters), summed over the observation, (B,) nats."""

    @abstractmethod
    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw observations, (B, N)."""

    @abstractmethod
    def mean(self, parameters: Tensor) -> Tensor:
        """Return the expected observations, (B, N)."""

    def check(self, x: Tensor) -> None:
        """Raise ValueError where ``x`` holds numbers that cannot be observed."""
        if not x.isfinite().all():
            count = int((~x.isfinite()).any(dim=-1).sum())
            raise ValueError(f"{count} of {len(x)} observations hold NaN or infinite numbers")

    def check_parameters(self, parameters: Tensor) -> None:
        """Raise ValueError where a decoder's outputs cannot be this likelihood's parameters."""


class Bernoulli(Likelihood):
    r"""Binary observations with the decoder's outputs as logits ℓ.

    .. math:: \log p(x|z) = \sum_i x_i ℓ_i - \mathrm{softplus}(ℓ_i)
    """

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Return log p(x | logits), (B,) nats."""
        return (x * parameters - softplus(parameters)).sum(dim=-1)

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw zeros and ones, (B, N)."""
        return torch.bernoulli(self.mean(parameters), generator=generator)

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the probabilities of a one, (B, N)."""
        return torch.sigmoid(parameters)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` is finite and within [0, 1]."""
        super().check(x)
        if x.numel() and (x.min() < 0 or x.max() > 1):
            raise ValueError(
                f"a Bernoulli likelihood needs observations in [0, 1], "
                f"got [{x.min():.4g}, {x.max():.4g}]; leave out "
                "transforms.Normalize and the like, and divide images of 0 to 255 by 255"
            )

    def check_parameters(self, parameters: Tensor) -> None:
        """Raise ValueError where all outputs, which differ, are probabilities, not logits."""
        low, high = float(parameters.min()), float(parameters.max())
        if 0 <= low < high <= 1:
            raise ValueError(
                "a Bernoulli likelihood takes logits, but all that the decoder returns lies in "
                "[0, 1]: leave out the Sigmoid that it ends in"
            )


class Gaussian(Likelihood):
    r"""Real observations with the decoder's outputs as means μ and one standard deviation s.

    .. math:: \log p(x|z) =
        -\sum_i \bigl[\tfrac{1}{2} ((x_i - μ_i) / s)^2 + \log s + \tfrac{1}{2} \log 2π\bigr]

    Arguments:
        scale: The standard deviation s.

    Raises:
        ValueError: ``scale`` is not a positive number.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"the scale of a Gaussian must be a positive number, got {scale}")
        self.scale = scale

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Return log p(x | means), (B,) nats."""
        return gaussian_log_prob((x - parameters) / self.scale, math.log(self.scale))

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw observations, (B, N)."""
        return parameters + self.scale * standard_normal(parameters, generator)

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the means themselves, (B, N)."""
        return parameters
