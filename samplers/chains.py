"""Long chains: many draws of a kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

from samplers.energy import Energy
from samplers.kernel import Kernel
from samplers.random import seeded_generator


class Chains(NamedTuple):
    """The draws of many chains and their statistics, on the CPU."""

    draws: Tensor
    """Positions, (chain, draw, dim)."""
    energy: Tensor
    """U at the draws in nats, (chain, draw)."""
    acceptance: Tensor
    """Acceptance probabilities, (chain, draw)."""
    diverging: Tensor
    """Whether the step failed, (chain, draw), boolean."""


@torch.no_grad()
def sample(
    kernel: Kernel,
    energy: Energy,
    position: Tensor,
    num_draws: int,
    *,
    thin: int = 1,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Chains:
    """Run every chain for ``num_draws * thin`` steps and keep each ``thin``-th state.

    Arguments:
        kernel: HMC, L2HMC or another kernel; it is not adapted.
        energy: U, from (chain, dim) to (chain,).
        position: Where the chains start, (chain, dim).
        num_draws: Draws to keep of each chain.
        thin: Steps from one kept draw to the next. Statistics are those of the kept steps.
        context: As returned by ``kernel.embed``.
        generator: Of the noise; without one, seed 0.

    Raises:
        ValueError: A count is below 1, or the energy is not finite where a chain starts.
    """
    if num_draws < 1 or thin < 1:
        raise ValueError(f"num_draws and thin must be at least 1, got {num_draws} and {thin}")
    generator = generator or seeded_generator(position.device, 0)
    state = kernel.init(position, energy)
    if not state.energy.isfinite().all():
        count = int((~state.energy.isfinite()).sum())
        raise ValueError(f"the energy is not finite at the start of {count} of the chains")
    kept = []
    for _ in range(num_draws):
        for _ in range(thin):
            state, info = kernel.step(state, energy, kernel.noise(state, generator), context)
        kept.append(Chains(state.position, state.energy, info.acceptance, info.diverging))
    return Chains(*(torch.stack(field, dim=1).cpu() for field in zip(*kept, strict=True)))
