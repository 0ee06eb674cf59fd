"""Short chains from the approximate posterior toward the posterior."""

from typing import NamedTuple

import torch
from torch import Tensor

from dglm.gaussian import DiagonalGaussian
from dglm.model import GenerativeModel
from samplers import Kernel, State, fresh_leaf, reciprocal_jump_loss, squared_jump


class Chain(NamedTuple):
    """A short chain from q(z|x) toward p(z|x) and what it cost the sampler."""

    state: State
    """After the last step."""
    log_joint: Tensor
    """log p(x, z_j) for j = 0 … J, (J + 1, B) nats."""
    loss: Tensor
    """The sampler's loss, summed over the steps, (B,)."""
    jump: Tensor
    """Mean over the steps of the accepted squared jump in units of q's variance, (B,)."""
    acceptance: Tensor
    """Mean over the steps, (B,)."""
    diverging: Tensor
    """Share of diverged steps, (B,)."""


def run_chain(
    model: GenerativeModel,
    kernel: Kernel,
    x: Tensor,
    q: DiagonalGaussian,
    start: Tensor,
    num_mh_steps: int,
    generator: torch.Generator | None = None,
    *,
    jump_scale: float = 1.0,
) -> Chain:
    """Run the kernel from ``start`` (B, latent_dim), differentiable in its parameters alone.

    Arguments:
        model: p(x, z).
        kernel: Its target is p(z|x).
        x: Observations, (B, N).
        q: The approximate posterior, whose variances are the unit of the jumps.
        start: z₀; no gradient reaches it.
        num_mh_steps: J, at least 1.
        generator: Of the noise.
        jump_scale: λ of the sampler's loss.
    """
    variance = q.variance().detach()
    energy, context = model.energy(x), kernel.embed(x)
    state = fresh_leaf(kernel.init(start.detach(), energy))
    energies, infos, jumps = [state.energy], [], []
    for _ in range(num_mh_steps):
        origin = state.position
        noise = kernel.noise(state, generator)
        [(state, info)] = kernel(state, energy, [noise], context)
        energies.append(state.energy)
        infos.append(info)
        jumps.append(squared_jump(origin, info, variance))
    jump = torch.stack(jumps)
    acceptance = torch.stack([info.acceptance for info in infos])
    return Chain(
        state,
        -torch.stack(energies).detach(),
        reciprocal_jump_loss(jump, acceptance, jump_scale).sum(dim=0),
        (jump * acceptance).detach().mean(dim=0),
        acceptance.detach().mean(dim=0),
        torch.stack([info.diverging for info in infos]).to(jump).mean(dim=0),
    )
