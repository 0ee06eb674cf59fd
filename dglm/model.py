"""The generative model p(x, z) = p(z) p(x|z), and the energy of its posterior."""

from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dglm.checks import check_function
from dglm.gaussian import gaussian_log_prob
from dglm.likelihoods import Bernoulli, Likelihood
from dglm.networks import Decoder, Selected
from dglm.precision import full_precision
from samplers import State, seeded_generator, value_and_gradient
from samplers.compiling import detached_linear
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

    def energy(self, x: Tensor) -> "PosteriorEnergy":
        """Return U(z) = -log p(x, z) for observations (B, N), with the model frozen.

        No gradient reaches the model's parameters through it; it sees their present values.
        """
        return PosteriorEnergy(self.negative_log_likelihood(x))

    def negative_log_likelihood(self, x: Tensor) -> "NegativeLogLikelihood":
        """Return z ↦ -log p(x|z) for observations (B, N), with the model frozen."""
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
        output, *others = check_function("decoder", self.decoder, z) or [torch.empty(0)]
        if others:
            raise ValueError(
                f"the decoder must return one tensor, flat (B, N), but it returns {1 + len(others)}"
            )
        if output.dim() != 2:
            raise ValueError(
                f"the decoder must return flat (B, N), but it returns {tuple(output.shape)} for "
                "B = 3; put torch.nn.Flatten() behind it"
            )
        # So far out that small logits, too, leave what probabilities are confined to.
        self.likelihood.check_parameters(self.decoder(torch.cat([1e4 * z, -1e4 * z])))
        return output.shape[1]

    def observations(self, x: Any) -> Tensor:
        """Return a batch as this model takes it: flat (B, N), of its type, on its device.

        Arguments:
            x: A tensor or array of observations; or such with labels behind, which are left out.

        Raises:
            ValueError: The batch is empty, or this model cannot have produced it.
        """
        x = self.flat(x, self.check_decoder())
        self.likelihood.check(x)
        return x.to(next(self.decoder.parameters(), torch.empty(0)))

    @staticmethod
    def flat(x: Any, width: int) -> Tensor:
        """Return a batch as :meth:`observations` does, but its numbers as they are, not looked at.

        Arguments:
            x: As there.
            width: N, the length of an observation.

        Raises:
            ValueError: The batch is empty, or of another shape.
        """
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
        return x.flatten(1)


class NegativeLogLikelihood:
    """z ↦ -log p(x|z) for given observations; no gradient reaches decoder or likelihood.

    They are not copied: after an update in place, an optimizer's, it is another function, and a
    State from before is stale.

    For a :class:`dglm.Decoder` with Bernoulli observations the gradient is taken by hand, which
    is faster than autograd; where it must be differentiated again, and for all other decoders,
    autograd takes it.

    Arguments:
        decoder: From z (B, latent_dim) to the likelihood's parameters (B, N).
        likelihood: p(x | parameters).
        x: Observations, (B, N).
    """

    def __init__(self, decoder: nn.Module, likelihood: Likelihood, x: Tensor) -> None:
        self.decoder = decoder
        self.likelihood = _frozen(likelihood)
        self.x = x
        self.frozen = {name: value.detach() for name, value in decoder.named_parameters()}
        plain = type(decoder) is Decoder and decoder.is_plain
        self.by_hand = plain and type(likelihood) is Bernoulli

    def __call__(self, z: Tensor) -> Tensor:
        """Return -log p(x|z), (B,) nats."""
        parameters = functional_call(self.decoder, self.frozen, (z,))
        return -self.likelihood.log_prob(parameters, self.x)

    def value_and_gradient(self, position: Tensor) -> State:
        """Return the value and the gradient at z (B, latent_dim)."""
        if not self.by_hand or (torch.is_grad_enabled() and position.requires_grad):
            return value_and_gradient(self.__call__, position)
        return State(position, *self._by_hand(position))

    def _by_hand(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Backpropagate by hand, in few passes over memory.

        With a = W h + b at each layer, what goes up is -a and -softplus(a); sigmoid(-a) is kept.
        """
        weights = [value for name, value in self.frozen.items() if name.endswith("weight")]
        biases = [-value for name, value in self.frozen.items() if name.endswith("bias")]
        hidden, complements = -z, []
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            hidden, complement = _activate(detached_linear(hidden, weight, bias))
            complements.append(complement)
        negative_logits = detached_linear(hidden, weights[-1], biases[-1])
        fit = torch.linalg.vecdot(self.x, negative_logits)
        normalizer, descent = _activate(negative_logits)
        descent += self.x - 1
        for weight, complement in zip(weights[:0:-1], complements[::-1], strict=True):
            product = detached_linear(descent, weight.T)
            descent = product.addcmul_(product, complement, value=-1)
        return fit - normalizer.sum(dim=-1), -(descent @ weights[0])


class PosteriorEnergy:
    """U(z) = -log p(x, z), the posterior's energy up to log p(x)."""

    def __init__(self, negative_log_likelihood: NegativeLogLikelihood) -> None:
        self.negative_log_likelihood = negative_log_likelihood

    def __call__(self, z: Tensor) -> Tensor:
        """Return U(z), (B,) nats."""
        return self.negative_log_likelihood(z) - gaussian_log_prob(z)

    def value_and_gradient(self, position: Tensor) -> State:
        """Return U and its gradient, that of the Gaussian prior being z itself."""
        state = self.negative_log_likelihood.value_and_gradient(position)
        energy = state.energy - gaussian_log_prob(position)
        return State(position, energy, state.gradient + position)


def _frozen(module: Any) -> Any:
    """Return a module with the same parameters, to which no gradient flows."""
    if next(module.parameters(), None) is None:
        return module
    frozen = copy(module)
    own = module._parameters.items()
    frozen._parameters = {name: each if each is None else each.detach() for name, each in own}
    frozen._modules = {name: _frozen(inside) for name, inside in module._modules.items()}
    return frozen


def _activate(output: Tensor) -> tuple[Tensor, Tensor]:
    """Return -softplus(a), in the place of ``output``, -a, and sigmoid(-a).

    One exponential gives both: -softplus(a) = log(sigmoid(-a)), or -a itself where that underflows.
    """
    complement = torch.sigmoid(output).clamp_(min=torch.finfo(output.dtype).tiny)
    return torch.minimum(torch.log(complement), output, out=output), complement
