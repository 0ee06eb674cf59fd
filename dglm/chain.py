"""Short chains from the approximate posterior toward the posterior, and a long one beside them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dglm.coordinates import Coordinates, score_loss, sibling_loss, without_coordinates
from dglm.gaussian import DiagonalGaussian
from dglm.model import GenerativeModel
from dglm.precision import full_precision
from samplers import HMC, Kernel, State, reciprocal_jump_loss
from samplers.adaptation import track_acceptance
from samplers.energy import fresh_leaf, twice
from samplers.hmc import JITTER
from samplers.objective import squared_jump

TRAINED_SHARE = 1 / 4
"""Of a batch, its first images: where a kernel in coordinates is trained. Second derivatives cost
several times what a step costs."""
TRAINED_EVERY = 8
"""Updates, of which the last trains such a kernel: that costs about as much as the chain."""


class Chain(NamedTuple):
    """A short chain from q(z|x) toward p(z|x) and what it cost the sampler."""

    start_gradient: Tensor
    """∂U(z₀), (B, latent_dim)."""
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

    def log_joint_at_start(self, z: Tensor) -> Tensor:
        """Return log p(x, z₀), (B,) nats, differentiable in z₀ = z (B, latent_dim).

        With the gradient that the chain took there, so that it costs no pass of the decoder.
        """
        moved = torch.linalg.vecdot(self.start_gradient, z - z.detach())
        return self.log_joint[0] - moved

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What training and validation both log, (B,) each."""
        return {
            "log_joint": self.log_joint[-1],
            "acceptance": self.acceptance,
            "divergence": self.diverging,
        }


def run_chain(
    model: GenerativeModel,
    kernel: Kernel,
    x: Tensor,
    q: DiagonalGaussian,
    start: Tensor,
    num_mh_steps: int,
    generator: torch.Generator | None = None,
    jump_scale: float = 1.0,
    train_sampler: bool = True,
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
        train_sampler: Whether a kernel in coordinates is trained; if not, its gradient is 0.
    """
    energy, context = model.energy(x), kernel.embed(x)
    coordinates = context.gaussian if isinstance(context, Coordinates) else None
    variance = (coordinates or q).variance().detach()
    trained = [each for each in without_coordinates(kernel).parameters() if each.requires_grad]
    learned = torch.is_grad_enabled() and len(trained) > 0
    with torch.set_grad_enabled(learned and coordinates is None):
        state = fresh_leaf(kernel.init(start.detach(), energy))
        start_gradient = state.gradient.detach()
        first = state
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
        if train_sampler:
            own = _siblings(model, kernel, x, (first, state), generator)
        else:  # 0, not none: processes wait for the gradients of all parameters
            own = 0 * torch.stack([each.sum() for each in trained]).sum()
        loss = own.expand(len(x))
    coordinate_loss = torch.zeros_like(loss)
    if coordinates is not None:
        coordinate_loss = score_loss(coordinates, state)
    return Chain(
        start_gradient,
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
    ends: tuple[State, State],
    generator: torch.Generator | None,
) -> Tensor:
    """Return the loss of two steps from where the chains of the first images are.

    Half of those images are where the chain began, half where it ended: from q, where the energy is
    high and few steps lead back, a sampler that has seen only the posterior diverges.
    """
    count = math.ceil(TRAINED_SHARE * len(x))
    half = count // 2
    twins = torch.cat([x[:count], x[:count]])
    position, potential, gradient = (
        torch.cat([first[:half], last[half:count]])
        for first, last in zip(ends[0][:3], ends[1][:3], strict=True)
    )
    start = fresh_leaf(twice(State(position, potential, gradient)))
    context, noise = kernel.embed(twins), kernel.noise(start, generator)
    _, info = kernel.step(start, model.energy(twins), noise, context)
    return sibling_loss(context.gaussian, start.position, info)


@full_precision()
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
    kernel, energy = HMC(num_leapfrogs, jitter=JITTER).to(start), model.energy(x)
    state = kernel.init(start, energy)
    warm_up = num_steps // 2
    for _ in range(warm_up):
        state, info = kernel.step(state, energy, kernel.noise(state, generator))
        track_acceptance(kernel, info.acceptance)
    total = torch.zeros_like(state.energy)
    for _ in range(num_steps - warm_up):
        state, _ = kernel.step(state, energy, kernel.noise(state, generator))
        total = total - state.energy
    return total / (num_steps - warm_up)
