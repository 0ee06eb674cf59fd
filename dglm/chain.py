"""Short chains from the approximate posterior toward the posterior."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dglm.coordinates import Coordinates, score_loss, sibling_loss, without_coordinates
from dglm.gaussian import DiagonalGaussian
from dglm.model import GenerativeModel
from samplers import Kernel, State, reciprocal_jump_loss
from samplers.energy import fresh_leaf, twice
from samplers.objective import squared_jump

TRAINED_SHARE = 1 / 8
"""Of a batch, its first images: where a kernel in coordinates is trained. Second derivatives cost
several times what a step costs."""


class Chain(NamedTuple):
    """A short chain from q(z|x) toward p(z|x) and what it cost the sampler."""

    state: State
    """After the last step."""
    log_joint: Tensor
    """log p(x, z_j) for j = 0 … J, (J + 1, B) nats."""
    loss: Tensor
    """The sampler's loss, (B,): of the kernel's steps, or of :func:`dglm.coordinates.sibling_loss`
    where it has learned coordinates."""
    coordinate_loss: Tensor
    """Of :func:`dglm.coordinates.score_loss` at z_J, (B,); 0 where the kernel has no learned
    coordinates."""
    jump: Tensor
    """Mean over the steps of the accepted squared jump, (B,): in units of the variances of q or,
    where the kernel has learned coordinates, of their Gaussian."""
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
        q: The approximate posterior, whose variances are the unit of the jumps where the kernel
            has no coordinates.
        start: z₀; no gradient reaches it.
        num_mh_steps: J, at least 1.
        generator: Of the noise.
        jump_scale: λ of the sampler's loss.
    """
    energy, context = model.energy(x), kernel.embed(x)
    coordinates = context.gaussian if isinstance(context, Coordinates) else None
    variance = (coordinates or q).variance().detach()
    parameters = without_coordinates(kernel).parameters()
    learned = torch.is_grad_enabled() and any(each.requires_grad for each in parameters)
    with torch.set_grad_enabled(learned and coordinates is None):
        state = fresh_leaf(kernel.init(start.detach(), energy))
        energies, infos, jumps = [state.energy], [], []
        for _ in range(num_mh_steps):
            origin = state.position
            noise = kernel.noise(state, generator)
            state, info = kernel.step(state, energy, noise, context)
            energies.append(state.energy)
            infos.append(info)
            jumps.append(squared_jump(origin, info, variance))
        jump = torch.stack(jumps)
        acceptance = torch.stack([info.acceptance for info in infos])
        loss = reciprocal_jump_loss(jump, acceptance, jump_scale).sum(dim=0)
    if learned and coordinates is not None:
        loss = _siblings(model, kernel, x, state, generator).expand(len(x))
    coordinate_loss = torch.zeros_like(loss)
    if coordinates is not None:
        coordinate_loss = score_loss(coordinates, state)
    return Chain(
        state,
        -torch.stack(energies).detach(),
        loss,
        coordinate_loss,
        (jump * acceptance).detach().mean(dim=0),
        acceptance.detach().mean(dim=0),
        torch.stack([info.diverging for info in infos]).to(jump).mean(dim=0),
    )


def _siblings(
    model: GenerativeModel,
    kernel: Kernel,
    x: Tensor,
    state: State,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the loss of two steps from where the chains of the first images are."""
    count = math.ceil(TRAINED_SHARE * len(x))
    twins = torch.cat([x[:count], x[:count]])
    position, potential, gradient = (part[:count] for part in state[:3])
    start = fresh_leaf(twice(State(position, potential, gradient)))
    context, noise = kernel.embed(twins), kernel.noise(start, generator)
    _, info = kernel.step(start, model.energy(twins), noise, context)
    return sibling_loss(context.gaussian, start.position, info)
