"""Long chains on p(z|x): the reference that short ones are compared with."""

import torch
from torch import Tensor

from dglm.model import GenerativeModel
from samplers import HMC, track_acceptance


@torch.no_grad()
def long_chain_log_joint(
    model: GenerativeModel,
    x: Tensor,
    start: Tensor,
    num_steps: int = 400,
    num_leapfrogs: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return each image's mean of log p(x, z) along a long HMC chain on p(z|x).

    The first half of the steps adapts the step size and is thrown away, the second half, with the
    step size frozen, is averaged.

    Arguments:
        model: p(x, z).
        x: Observations, (B, N).
        start: Where the chains start, (B, latent_dim).
        num_steps: Metropolis-Hastings steps in all, at least 2.
        num_leapfrogs: Leapfrogs a step.
        generator: Of the noise; without one, torch's global generator.

    Returns:
        Means, (B,) nats.

    Raises:
        ValueError: ``num_steps`` is below 2.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, got {num_steps}")
    kernel, energy = HMC(num_leapfrogs).to(start), model.energy(x)
    state = kernel.init(start, energy)
    warm_up = num_steps // 2
    for _ in range(warm_up):
        state, (info,) = kernel(state, energy, [kernel.noise(state, generator)])
        track_acceptance(kernel, info.acceptance)
    total = torch.zeros_like(state.energy)
    for _ in range(num_steps - warm_up):
        state, _ = kernel(state, energy, [kernel.noise(state, generator)])
        total = total - state.energy
    return total / (num_steps - warm_up)
