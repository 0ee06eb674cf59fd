"""The networks S, T and Q of L2HMC, and the embedding of what the energy is conditioned on."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from samplers.energy import finite_gradient
from samplers.leapfrog import Update

_LARGEST_INPUT = 1e30


class UpdateNetwork(nn.Module):
    r"""S, T and Q on a shared trunk.

    .. math::
        h &= \mathrm{relu}(W_2\, \mathrm{relu}(W_1 (a, b, τ) + c)), \\
        S &= e^{λ_S} \tanh(W_S h), \quad T = W_T h, \quad Q = e^{λ_Q} \tanh(W_Q h)

    The three heads start near zero, so that training starts at Hamiltonian Monte Carlo.

    Arguments:
        dim: D, coordinates of the position.
        hidden: Units in each of the two hidden layers, and length of the context.
        head_scale: Factor on the initial weights of the heads.

    References:
        Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
        Sohl-Dickstein, 2018), Appendix B.
    """

    def __init__(self, dim: int, hidden: int, head_scale: float) -> None:
        super().__init__()
        self.inputs = nn.Linear(2 * dim + 2, hidden)
        self.trunk = nn.Linear(hidden, hidden)
        self.heads = nn.Linear(hidden, 3 * dim)
        self.log_amplitude = nn.Parameter(torch.zeros(2 * dim))
        with torch.no_grad():
            self.heads.weight.mul_(head_scale)
            self.heads.bias.zero_()

    def forward(
        self, first: Tensor, second: Tensor, time: Tensor, context: Tensor | None
    ) -> Update:
        """Return S, T and Q, each (B, D).

        Arguments:
            first: a, (B, D).
            second: b, (B, D).
            time: τ, (B, 2).
            context: c, (B, hidden), or None.
        """
        # Weight gradients are sums over chains of input times gradient: one diverged chain
        # must bring neither a non-finite input, nor one so large that the hidden layers
        # overflow, nor a non-finite gradient into them.
        inputs = torch.cat([first, second, time], dim=-1).nan_to_num(0.0, 0.0, 0.0)
        inputs = inputs.clamp(-_LARGEST_INPUT, _LARGEST_INPUT)
        features = self.inputs(inputs.to(self.inputs.weight.dtype))
        if context is not None:
            features = features + context
        heads = self.heads(torch.relu(self.trunk(torch.relu(features))))
        heads = heads.to(first.dtype)  # chains keep their precision, whatever the networks'
        bounded, translation = heads.split(self.log_amplitude.numel(), dim=-1)
        bounded = finite_gradient(self.log_amplitude.exp().to(first.dtype) * torch.tanh(bounded))
        scale, gate = bounded.chunk(2, dim=-1)
        return Update(scale, finite_gradient(translation), gate)


def embedding_network(sizes: Sequence[int]) -> nn.Sequential:
    """Return a softplus network with the given layer sizes, linear at its end."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.Softplus()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
