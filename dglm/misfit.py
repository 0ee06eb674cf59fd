"""The part of a posterior's energy that costs a decoder pass, -log p(x|z), and its gradient."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dglm.likelihoods import Bernoulli, Likelihood
from dglm.networks import Decoder
from samplers import State, evaluate


class Misfit:
    """z ↦ -log p(x|z) for given observations, with the decoder frozen at its present weights.

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
        self.buffers: list[_Buffers] = []
        self.by_hand = type(decoder) is Decoder and type(likelihood) is Bernoulli

    def __call__(self, z: Tensor) -> Tensor:
        """Return -log p(x|z), (B,) nats."""
        parameters = functional_call(self.decoder, self.frozen, (z,))
        return -self.likelihood.log_prob(parameters, self.x)

    def evaluate(self, position: Tensor) -> State:
        """Return the value and the gradient at z (B, latent_dim)."""
        if not self.by_hand or (torch.is_grad_enabled() and position.requires_grad):
            return evaluate(self.__call__, position)
        return State(position, *self._by_hand(position))

    def _by_hand(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Backpropagate by hand, in few passes over memory, the signs folded into the products.

        With a = W h + b at each layer, its buffers hold -softplus(a) and sigmoid(-a).
        """
        weights = [value for name, value in self.frozen.items() if name.endswith("weight")]
        biases = [value for name, value in self.frozen.items() if name.endswith("bias")]
        if not self.buffers or len(self.buffers[0].output) != len(z):
            self.buffers = [_Buffers(*z.new_empty(3, len(z), len(bias))) for bias in biases]
            self.ones_missing = self.x - 1
        hidden, sign = z, -1
        for weight, bias, buffers in zip(weights, biases, self.buffers, strict=True):
            torch.addmm(bias, hidden, weight.T, beta=-1, alpha=sign, out=buffers.output)
            if buffers is self.buffers[-1]:
                fit = torch.linalg.vecdot(self.x, buffers.output)
            _activate(buffers)
            hidden, sign = buffers.output, 1
        value = fit - self.buffers[-1].output.sum(dim=-1)
        descent = self.buffers[-1].complement.add_(self.ones_missing)
        for weight, below in zip(weights[:0:-1], self.buffers[-2::-1], strict=True):
            torch.mm(descent, weight, out=below.output)
            descent = torch.addcmul(
                below.output, below.output, below.complement, value=-1, out=below.work
            )
        return value, -(descent @ weights[0])


class _Buffers(NamedTuple):
    """Room for one layer, taken once: new memory for each gradient costs more than its sums."""

    output: Tensor
    complement: Tensor
    work: Tensor


def _activate(buffers: _Buffers) -> None:
    """Replace ``output``, -a, by -softplus(a), and ``complement`` by sigmoid(-a).

    One exponential gives both: -softplus(a) = log(sigmoid(-a)), or -a itself where that underflows.
    """
    output, complement, work = buffers
    torch.sigmoid(output, out=complement).clamp_(min=torch.finfo(output.dtype).tiny)
    torch.minimum(torch.log(complement, out=work), output, out=output)
