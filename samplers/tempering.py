"""Parallel tempering: HMC at several temperatures, for modes that one chain cannot leave."""

import torch
from torch import Tensor

from samplers.chains import Chains
from samplers.energy import Energy, State, evaluate
from samplers.hmc import HMC
from samplers.random import seeded_generator


@torch.no_grad()
def parallel_tempering(
    energy: Energy,
    position: Tensor,
    num_draws: int,
    temperatures: Tensor,
    *,
    num_leapfrogs: int = 10,
    step_size: float = 0.1,
    generator: torch.Generator | None = None,
) -> Chains:
    r"""Draw with replicas at temperatures 1 = T₁ < … < T_K that exchange their positions.

    Between two draws each replica takes one HMC step on U/T_k, of step size ε √T_k; then every
    second pair of neighbours, odd and even ones in turn, is swapped with probability

    .. math:: \min\bigl(1, \exp\bigl((1/T_k - 1/T_{k+1}) (U_k - U_{k+1})\bigr)\bigr)

    One draw costs K · ``num_leapfrogs`` gradients.

    Arguments:
        energy: U, from (B, D) to (B,).
        position: Where all replicas of a chain start, (chain, dim).
        num_draws: Draws of each chain, those of the replica at T₁.
        temperatures: T, increasing from 1, (K,).
        num_leapfrogs: Leapfrogs a step.
        step_size: ε at T₁.
        generator: Of the noise; without one, seed 0.

    Raises:
        ValueError: The temperatures do not increase from 1, or there are no draws to make.

    References:
        Markov chain Monte Carlo maximum likelihood (Geyer, 1991).
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    ladder = temperatures.dim() == 1 and bool(temperatures.isfinite().all())
    if not (ladder and temperatures[:1].eq(1).any() and (temperatures.diff() > 0).all()):
        raise ValueError(f"temperatures must increase from 1, got {temperatures.tolist()}")
    generator = generator or seeded_generator(position.device, 0)
    count, chains = len(temperatures), len(position)
    inverse = (1 / temperatures).to(position)
    tempered = _Tempered(energy, inverse.repeat_interleave(chains))
    kernel = HMC(num_leapfrogs, step_size).to(position.device)
    kernel.log_step_size = kernel.log_step_size - 0.5 * tempered.inverse.log()[:, None]
    state = kernel.init(position.repeat(count, 1), tempered)
    kept = []
    for draw in range(num_draws):
        state, (info,) = kernel(state, tempered, [kernel.noise(state, generator)])
        order = _exchange(state.extra[0].view(count, chains), inverse, draw % 2, generator)
        position, energies, gradient = (
            part.view(count, chains, -1).take_along_dim(order[..., None], dim=0).flatten(0, 1)
            for part in (state.position, *state.extra)
        )
        state = tempered.at(position, energies[:, 0], gradient)
        fields = position, energies[:, 0], info.acceptance, info.diverging
        kept.append([field[:chains] for field in fields])
    return Chains(*(torch.stack(field, dim=1).cpu() for field in zip(*kept, strict=True)))


class _Tempered:
    """U/T, a temperature for each row; U and its gradient follow as the state's ``extra``."""

    def __init__(self, energy: Energy, inverse: Tensor) -> None:
        self.energy = energy
        self.inverse = inverse

    def evaluate(self, position: Tensor) -> State:
        state = evaluate(self.energy, position)
        return self.at(position, state.energy, state.gradient)

    def at(self, position: Tensor, energy: Tensor, gradient: Tensor) -> State:
        scaled = self.inverse[:, None] * gradient
        return State(position, self.inverse * energy, scaled, (energy, gradient))


def _exchange(energy: Tensor, inverse: Tensor, first: int, generator: torch.Generator) -> Tensor:
    """Return which replica's position each replica gets, (K, B)."""
    count, chains = energy.shape
    order = torch.arange(count, device=energy.device)[:, None].repeat(1, chains)
    lower = torch.arange(count - 1, device=energy.device)[first::2]
    log_ratio = (inverse[lower] - inverse[lower + 1])[:, None] * (energy[lower] - energy[lower + 1])
    uniform = torch.rand(
        log_ratio.shape, generator=generator, dtype=energy.dtype, device=energy.device
    )
    swap = uniform.log() < log_ratio
    order[lower] += swap.long()
    order[lower + 1] -= swap.long()
    return order
