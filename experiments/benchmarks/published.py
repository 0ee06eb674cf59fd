"""The trajectory as it was first published, for comparison."""

from typing import Any

import torch
from torch import Tensor

from samplers import L2HMC, Endpoint, Energy, PhasePoint, State, value_and_gradient
from samplers.l2hmc import Update, UpdateNetwork, augmented_leapfrog


class PublishedL2HMC(L2HMC):
    """L2HMC with all the work of its first release: the same numbers, many times over.

    Both directions run for every chain, half of the results thrown away; each leapfrog takes both
    its gradients anew, and the acceptance the energies of both ends; each call of a network embeds
    the images anew, and inputs and heads of the networks have a product each.

    References:
        Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
        Sohl-Dickstein, 2018): the code released with it.
    """

    def embed(self, observations: Tensor) -> Tensor | None:
        """Return the observations themselves, which :meth:`integrate` embeds."""
        return observations

    def integrate(self, start: PhasePoint, energy: Energy, context: Any = None) -> Endpoint:
        """Take ``num_leapfrogs`` leapfrogs in both directions, and choose."""
        assert context is not None
        ahead = torch.ones_like(start.direction)
        forward = self._one_way(start._replace(direction=ahead), energy, context)
        backward = self._one_way(start._replace(direction=-ahead), energy, context)
        position, energies, gradient, momentum, log_determinant = (
            torch.where((start.direction > 0).view(-1, *[1] * (ours.dim() - 1)), ours, theirs)
            for ours, theirs in zip(forward, backward, strict=True)
        )
        return Endpoint(State(position, energies, gradient), momentum, log_determinant)

    def _one_way(self, start: PhasePoint, energy: Energy, images: Tensor) -> list[Tensor]:
        assert callable(energy)
        state, momentum, direction = start
        forward = bool(direction[0] > 0)
        # Of rounding's size: whatever takes the kept energy of the start takes this one instead.
        log_determinant = energy(state.position) - state.energy
        for step in range(self.num_leapfrogs):
            place = step if forward else self.num_leapfrogs - 1 - step
            time = self.times[place].expand(len(momentum), -1)
            mask = (self.mask[place] if forward else ~self.mask[place]).expand_as(momentum)

            def momentum_update(x: Tensor, gradient: Tensor, time: Tensor = time) -> Update:
                embedded = super(PublishedL2HMC, self).embed(images)
                return unfused(self.momentum_network, x, gradient, time, embedded)

            def position_update(fixed: Tensor, v: Tensor, time: Tensor = time) -> Update:
                embedded = super(PublishedL2HMC, self).embed(images)
                return unfused(self.position_network, fixed, v, time, embedded)

            state, momentum, change = augmented_leapfrog(
                value_and_gradient(energy, state.position),
                momentum,
                direction,
                energy,
                self.step_size.expand(len(momentum), 1),
                mask,
                momentum_update,
                position_update,
            )
            log_determinant = log_determinant + change
        energies = energy(state.position)
        return [state.position, energies, state.gradient, momentum, log_determinant]


def unfused(
    network: UpdateNetwork, first: Tensor, second: Tensor, time: Tensor, context: Tensor | None
) -> Update:
    """Return what the network does, with a matrix product for each input and each head."""
    dim = first.shape[-1]
    features = network.inputs.bias if context is None else network.inputs.bias + context
    weights = network.inputs.weight.split([dim, dim, 2], dim=1)
    for each, weight in zip((first, second, time), weights, strict=True):
        features = features + each @ weight.T
    hidden = torch.relu(network.trunk(torch.relu(features)))
    heads = zip(network.heads.weight.split(dim), network.heads.bias.split(dim), strict=True)
    scale, gate, translation = (hidden @ weight.T + bias for weight, bias in heads)
    amplitude = network.log_amplitude.exp().split(dim)
    return Update(amplitude[0] * scale.tanh(), translation, amplitude[1] * gate.tanh())
