"""Long chains on p(z|x): the reference that short ones are compared with, and its shape."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dglm.model import GenerativeModel
from dglm.shape import ChainMeans, PrincipalAxes
from samplers import HMC, Chains, Energy, Kernel, Moments, sample_chunks, track_acceptance

_CHUNK_SIZE = 50
_KEPT_DRAWS = 200


class LongChains(NamedTuple):
    """What is kept of many long chains, at a memory that does not grow with their length."""

    means: ChainMeans
    """Over all draws of each chain, for figures of shape and their errors."""
    draws: Tensor
    """At most 200 draws of each chain, evenly spaced: for pictures and R̂, (chain, kept, D)."""
    acceptance: Tensor
    """Mean acceptance probability of each chain, (chain,)."""
    divergence: Tensor
    """Share of failed steps of each chain, (chain,)."""
    gradient_evaluations: int
    """Of all chains together."""


@torch.no_grad()
def long_chains(
    kernel: Kernel,
    energy: Energy,
    position: Tensor,
    num_steps: int,
    axes: PrincipalAxes,
    generator: torch.Generator,
    context: Tensor | None = None,
    progress: Callable[[int], object] = lambda steps: None,
) -> LongChains:
    """Run chains on p(z|x) and look at them along its principal axes, at constant memory.

    Arguments:
        kernel: Not adapted.
        energy: U of one image, from (chain, D) to (chain,).
        position: Where the chains start, (chain, D), after their warm-up.
        num_steps: Metropolis-Hastings steps of each chain.
        axes: Found beforehand, from other draws than these.
        generator: Of the noise.
        context: As returned by ``kernel.embed``.
        progress: Called with the number of steps made since the last call.

    Raises:
        ValueError: ``num_steps`` is below 1, or the energy is not finite where a chain starts.
    """
    thin = -(-num_steps // _KEPT_DRAWS)
    kept, done = [], 0
    for chunk in _chunks(kernel, energy, position, num_steps, generator, context):
        size = chunk.draws.shape[1]
        means = ChainMeans.of(axes, chunk.draws)
        rates = torch.stack([chunk.acceptance, chunk.diverging.to(chunk.acceptance)]).mean(dim=2)
        kept.append(chunk.draws[:, (thin - 1 - done) % thin :: thin].clone())
        if done == 0:
            all_means, all_rates = means, rates
        done += size
        all_means = all_means.mixed(means, size / done)
        all_rates = torch.lerp(all_rates, rates, size / done)
        progress(size)
    gradients = len(position) * (num_steps * kernel.num_leapfrogs + 1)
    acceptance, divergence = all_rates
    return LongChains(all_means, torch.cat(kept, dim=1), acceptance, divergence, gradients)


@torch.no_grad()
def principal_axes(
    kernel: Kernel,
    energy: Energy,
    position: Tensor,
    num_steps: int,
    generator: torch.Generator,
    context: Tensor | None = None,
    progress: Callable[[int], object] = lambda steps: None,
) -> tuple[PrincipalAxes, Tensor]:
    """Warm chains up; return the axes of the second half of their draws and where they end.

    The arguments are those of :func:`long_chains`.

    Raises:
        ValueError: As there, or z has one coordinate only, or one that does not move.
    """
    warm_up, done, dim = num_steps // 2, 0, position.shape[1]
    moments = Moments(torch.zeros(dim).double(), torch.zeros(dim, dim).double())
    for chunk in _chunks(kernel, energy, position, num_steps, generator, context):
        late = chunk.draws[:, max(0, warm_up - done) :]
        done += chunk.draws.shape[1]
        progress(chunk.draws.shape[1])
        if late.numel():
            found = Moments.of(late.double().flatten(0, 1))
            moments = moments.mixed(found, late.shape[1] / (done - warm_up))
    return PrincipalAxes.of(moments), chunk.draws[:, -1].to(position)


def _chunks(
    kernel: Kernel,
    energy: Energy,
    position: Tensor,
    num_steps: int,
    generator: torch.Generator,
    context: Tensor | None,
) -> Iterator[Chains]:
    chunks = sample_chunks(
        kernel,
        energy,
        position,
        num_steps,
        chunk_size=_CHUNK_SIZE,
        context=context,
        generator=generator,
    )
    return (chunk for chunk, _ in chunks)


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
