"""The energy of a posterior, -log p(x, z), and its gradient."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dglm.gaussian import gaussian_log_prob
from dglm.likelihoods import Bernoulli, Likelihood
from dglm.networks import Decoder
from samplers import State, value_and_gradient
from samplers.compiling import detached_linear


class NegativeLogLikelihood:
    """z ↦ -log p(x|z) for given observations; no gradient reaches the decoder's weights.

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
        self.likelihood = likelihood
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


def _activate(output: Tensor) -> tuple[Tensor, Tensor]:
    """Return -softplus(a), in the place of ``output``, -a, and sigmoid(-a).

    One exponential gives both: -softplus(a) = log(sigmoid(-a)), or -a itself where that underflows.
    """
    complement = torch.sigmoid(output).clamp_(min=torch.finfo(output.dtype).tiny)
    return torch.minimum(torch.log(complement), output, out=output), complement
