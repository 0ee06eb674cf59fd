"""Short chains from the approximate posterior toward the posterior."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dglm.coordinates import Coordinates, score_loss, without_coordinates
from dglm.gaussian import DiagonalGaussian
from dglm.model import GenerativeModel
from samplers import Kernel, State, reciprocal_jump_loss
from samplers.energy import fresh_leaf
from samplers.objective import squared_jump


class Chain(NamedTuple):
    """A short chain from q(z|x) toward p(z|x) and what it cost the sampler."""

    state: State
    """After the last step."""
    log_joint: Tensor
    """log p(x, z_j) for j = 0 … J, (J + 1, B) nats."""
    loss: Tensor
    """The sampler's loss, summed over the steps, of the rows that it is trained on, (n,)."""
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
    sampler_share: float = 1.0,
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
        sampler_share: Share of the rows, the first ones, on which a learned kernel is trained: the
            others take no second derivatives, which are most of the work.
    """
    sampler = without_coordinates(kernel)
    learned = torch.is_grad_enabled() and any(each.requires_grad for each in sampler.parameters())

    def run(rows: slice, learned: bool) -> Chain:
        energy, context = model.energy(x[rows]), kernel.embed(x[rows])
        coordinates = context.gaussian if isinstance(context, Coordinates) else None
        unit = (
            DiagonalGaussian(q.mean[rows], q.log_std[rows]) if coordinates is None else coordinates
        )
        variance = unit.variance().detach()
        with torch.set_grad_enabled(learned):
            state = fresh_leaf(kernel.init(start[rows].detach(), energy))
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

    trained = math.ceil(sampler_share * len(x))
    if not learned or trained == len(x):
        return run(slice(None), learned)
    return _joined(run(slice(trained), True), run(slice(trained, None), False))


def _joined(first: Chain, rest: Chain) -> Chain:
    """Return both chains as one; the loss stays that of the first."""
    parts = zip(first.state.extra, rest.state.extra, strict=True)
    state = State(
        torch.cat([first.state.position, rest.state.position]),
        torch.cat([first.state.energy, rest.state.energy]),
        torch.cat([first.state.gradient, rest.state.gradient]),
        tuple(torch.cat(part) for part in parts),
    )
    return Chain(
        state,
        torch.cat([first.log_joint, rest.log_joint], dim=1),
        first.loss,
        *(torch.cat(part) for part in zip(first[3:], rest[3:], strict=True)),
    )
