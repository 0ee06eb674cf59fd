"""Parallel tempering: HMC at several temperatures, for modes that one chain cannot leave."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samplers.chains import Chains, still_chains, warn_of_still
from samplers.energy import Energy, State, Tempered
from samplers.hmc import HMC, JITTER
from samplers.kernel import finite_start


@torch.no_grad()
def parallel_tempering(
    energy: Energy,
    position: Tensor,
    num_draws: int,
    temperatures: Tensor | Sequence[float],
    *,
    num_leapfrogs: int = 10,
    step_size: float = 0.1,
    generator: torch.Generator | None = None,
) -> Chains:
    r"""Draw with replicas at temperatures 1 = T₁ < … < T_K that exchange their positions.

    Between two draws each replica takes one HMC step on U/T_k, of a step size between half of
    ε √T_k and all of it; then every second pair of neighbours, odd and even ones in turn, is
    swapped with probability

    .. math:: \min\bigl(1, \exp\bigl((1/T_k - 1/T_{k+1}) (U_k - U_{k+1})\bigr)\bigr)

    One draw costs K · ``num_leapfrogs`` gradients.

    Arguments:
        energy: U, from (B, D) to (B,).
        position: Where all replicas of a chain start, (chain, dim).
        num_draws: Draws of each chain, those of the replica at T₁.
        temperatures: T, increasing from 1, (K,).
        num_leapfrogs: Leapfrogs a step.
        step_size: ε at T₁.
        generator: Of the noise; without one, torch's global generator.

    Raises:
        ValueError: The temperatures do not increase from 1, there are no draws to make, or the
            energy or its gradient is not finite where a chain starts.

    References:
        Markov chain Monte Carlo maximum likelihood (Geyer, 1991).
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    temperatures = torch.as_tensor(temperatures)
    ladder = temperatures.dim() == 1 and bool(temperatures.isfinite().all())
    if not (ladder and temperatures[:1].eq(1).any() and (temperatures.diff() > 0).all()):
        raise ValueError(f"temperatures must increase from 1, got {temperatures.tolist()}")
    kernel = HMC(num_leapfrogs, step_size, JITTER)
    position = finite_start(kernel, energy, position).position
    kernel.to(position.device)
    count, chains = len(temperatures), len(position)
    temperature = temperatures.to(position).repeat_interleave(chains)
    tempered = Tempered(energy, temperature)
    kernel.log_step_size = kernel.log_step_size + 0.5 * temperature.log()[:, None]
    state = kernel.init(position.repeat(count, 1), tempered)
    inverse, column = (1 / temperatures).to(position), torch.arange(chains, device=position.device)
    kept = []
    for draw in range(num_draws):
        state, info = kernel.step(state, tempered, kernel.noise(state, generator))
        potential = (temperature * state.energy).view(count, chains)
        order = _exchange(potential, inverse, draw % 2, generator)
        state = _moved(state, temperature, (chains * order + column).flatten())
        fields = state.position, state.energy, info.acceptance, info.diverging
        kept.append([field[:chains].clone() for field in fields])
    found = Chains(*(torch.stack(field, dim=1).cpu() for field in zip(*kept, strict=True)))
    warn_of_still(still_chains(found.draws), num_draws, num_draws)
    return found


def _moved(state: State, temperature: Tensor, rows: Tensor) -> State:
    """Return the state in which each row has what ``rows`` had, at its own temperature."""
    scale = temperature[rows] / temperature
    position, energy, gradient = (field[rows] for field in state[:3])
    extra = tuple(field[rows] for field in state.extra)
    return State(position, scale * energy, scale[:, None] * gradient, extra)


def _exchange(
    energy: Tensor, inverse: Tensor, first: int, generator: torch.Generator | None
) -> Tensor:
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
