"""The generative model p(x, z) = p(z) p(x|z)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dglm.checks import check_function
from dglm.energy import NegativeLogLikelihood, PosteriorEnergy
from dglm.gaussian import gaussian_log_prob
from dglm.likelihoods import Bernoulli, Likelihood
from dglm.networks import Selected
from dglm.precision import full_precision
from samplers import seeded_generator
from samplers.random import standard_normal


class GenerativeModel(nn.Module):
    r"""A deep latent Gaussian model.

    .. math:: z \sim N(0, I), \quad x \sim p(x | f(z))

    Arguments:
        decoder: f, any module from z (B, latent_dim) to logits or means (B, N).
        latent_dim: Length of z.
        likelihood: What the decoder's output means; Bernoulli logits by default.

    Raises:
        ValueError: ``latent_dim`` is below 1.

    References:
        Auto-encoding variational Bayes (Kingma and Welling, 2014).
        Stochastic backpropagation and approximate inference in deep generative models (Rezende,
        Mohamed and Wierstra, 2014).

    Example:
        >>> import torch
        >>> from dglm import GenerativeModel
        >>> model = GenerativeModel(torch.nn.Linear(2, 6), latent_dim=2)
        >>> x, z = model.sample(3)
        >>> model.log_joint(x, z).shape
        torch.Size([3])
    """

    def __init__(
        self, decoder: nn.Module, latent_dim: int, likelihood: Likelihood | None = None
    ) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.likelihood = Bernoulli() if likelihood is None else likelihood

    def log_prior(self, z: Tensor) -> Tensor:
        """Return log p(z), (B,) nats."""
        return gaussian_log_prob(z)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x|z), (B,) nats."""
        return self.likelihood.log_prob(self.decoder(z), x)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x, z), (B,) nats, for observations (B, N) and latent variables (B, D)."""
        return self.log_likelihood(x, z) + self.log_prior(z)

    def energy(self, x: Tensor) -> PosteriorEnergy:
        """Return U(z) = -log p(x, z) for observations (B, N), with the decoder frozen.

        No gradient reaches the decoder's parameters through it; it sees their present values.
        """
        return PosteriorEnergy(self.negative_log_likelihood(x))

    def negative_log_likelihood(self, x: Tensor) -> NegativeLogLikelihood:
        """Return z ↦ -log p(x|z) for observations (B, N), with the decoder frozen."""
        return NegativeLogLikelihood(self.decoder, self.likelihood, x)

    def marginal(self, given: Tensor) -> "GenerativeModel":
        r"""Return the model of some of the observations alone.

        .. math:: p(z) \prod_{i \text{ given}} p(x_i|z)

        Observations are independent given z, so that leaving the others out integrates them out.
        The decoder is shared.

        Arguments:
            given: True where an observation is kept, boolean, (N,).

        Raises:
            ValueError: The mask has the wrong type or shape, or keeps nothing.
        """
        width = self.check_decoder()
        if given.dtype != torch.bool or given.shape != (width,):
            raise ValueError(
                f"the mask of given observations must be boolean, ({width},), "
                f"got {given.dtype}, {tuple(given.shape)}"
            )
        if not given.any():
            raise ValueError("no observation is given: what is left is the prior")
        device = next(self.decoder.parameters(), given).device
        decoder = Selected(self.decoder, given.to(device))
        return GenerativeModel(decoder, self.latent_dim, self.likelihood)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw n observations and their latent variables, (n, N) and (n, latent_dim)."""
        parameter = next(self.decoder.parameters(), torch.empty(0))
        z = torch.randn(
            n,
            self.latent_dim,
            generator=generator,
            dtype=parameter.dtype,
            device=parameter.device,
        )
        return self.likelihood.sample(self.decoder(z), generator), z

    @full_precision()
    @torch.no_grad()
    def check_decoder(self) -> int:
        """Return N, the length of an observation.

        Raises:
            ValueError: The decoder's output is not flat, (B, N), or not a function of z alone, or
                cannot be what the likelihood takes.
        """
        parameter = next(self.decoder.parameters(), torch.empty(0))
        generator = seeded_generator(parameter.device, 0, "decoder check")
        z = standard_normal(parameter.new_empty(3, self.latent_dim), generator)
        output = check_function("decoder", self.decoder, z)[0]
        if output.dim() != 2:
            raise ValueError(
                f"the decoder must return flat (B, N), but it returns {tuple(output.shape)} for "
                "B = 3; put torch.nn.Flatten() behind it"
            )
        self.likelihood.check_parameters(self.decoder(torch.cat([10 * z, -10 * z])))
        return output.shape[1]

    def observations(self, x: Any) -> Tensor:
        """Return a batch as this model takes it: flat (B, N), of its type, on its device.

        Arguments:
            x: A tensor or array of observations; or such with labels behind, which are left out.

        Raises:
            ValueError: The batch is empty, or this model cannot have produced it.
        """
        width = self.check_decoder()
        if isinstance(x, (tuple, list)) and len(x) > 0 and isinstance(x[0], (Tensor, np.ndarray)):
            x = x[0]
        try:
            x = torch.as_tensor(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"observations must be a tensor or an array, got {type(x)}") from error
        if x.dim() < 2 or x.shape[1:].numel() != width:
            raise ValueError(
                f"this model's observations are flat, (B, {width}), or images of {width} numbers, "
                f"got {tuple(x.shape)}"
            )
        if len(x) == 0:
            raise ValueError("there are no observations: the batch is empty")
        self.likelihood.check(x)
        parameter = next(self.decoder.parameters(), torch.empty(0))
        return x.flatten(1).to(parameter)
