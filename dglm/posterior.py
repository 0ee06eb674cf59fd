"""Long chains on p(z|x): the reference that short ones are compared with, and its shape."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dglm.model import GenerativeModel
from dglm.precision import full_precision
from dglm.shape import ChainMeans, PrincipalAxes
from samplers import HMC, Chains, Energy, Kernel, sample_chunks
from samplers.adaptation import Moments, track_acceptance
from samplers.chains import Snapshot
from samplers.io import Resumable
from samplers.kernel import Context

_CHUNK_SIZE = 50
_KEPT_DRAWS = 200
_SAVE_SECONDS = 60.0


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


@full_precision()
@torch.no_grad()
def long_chains(
    kernel: Kernel,
    energy: Energy,
    position: Tensor,
    num_steps: int,
    axes: PrincipalAxes,
    generator: torch.Generator,
    context: Context = None,
    progress: Callable[[int], object] = lambda steps: None,
    checkpoint: Path | None = None,
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
        progress: Called with the number of steps made since the last call; an exception that it
            raises ends the run, which is saved first.
        checkpoint: A file to save into once a minute and to go on from, where it exists; the
            resumed run repeats the uninterrupted one.

    Raises:
        ValueError: ``num_steps`` is below 1, the energy is not finite where a chain starts, or the
            checkpoint is damaged or of another run.
    """
    run = _LongRun(position, num_steps, axes, generator)
    saved = Resumable(checkpoint, run.start)
    if (content := saved.load()) is not None:
        run.resume(content)
        progress(run.done)
    saved_at = time.monotonic()
    for chunk, snapshot in run.rest(kernel, energy, generator, context):
        run.add(chunk, snapshot)
        due = run.done == num_steps or time.monotonic() - saved_at > _SAVE_SECONDS
        try:
            progress(chunk.draws.shape[1])
        except BaseException:
            due = True
            raise
        finally:
            if due:
                saved.save(run.state())
                saved_at = time.monotonic()
    generator.set_state(run.end["generator"].cpu())  # that of a snapshot is another one
    gradients = len(position) * (num_steps * kernel.num_leapfrogs + 1)
    acceptance, divergence = run.rates
    return LongChains(run.means, torch.cat(run.kept, dim=1), acceptance, divergence, gradients)


class _LongRun:
    """Long chains between two chunks.

    The position and the generator at the start, the length and the axes tell one run from another:
    they depend on all else.
    """

    means: ChainMeans
    rates: Tensor  # of acceptance and divergence, (2, chain)
    end: Snapshot  # of the last chunk

    def __init__(
        self, position: Tensor, num_steps: int, axes: PrincipalAxes, generator: torch.Generator
    ) -> None:
        self.position, self.num_steps, self.axes = position, num_steps, axes
        self.start = {
            "position": position.cpu(),
            "generator": generator.get_state(),
            "num_steps": num_steps,
            "axes": axes._asdict(),
        }
        self.thin = -(-num_steps // _KEPT_DRAWS)
        self.done = 0
        self.kept: list[Tensor] = []

    def rest(
        self, kernel: Kernel, energy: Energy, generator: torch.Generator, context: Context
    ) -> Iterator[tuple[Chains, Snapshot]]:
        """Return the chunks that are left."""
        if self.done == self.num_steps > 0:
            return iter(())
        return sample_chunks(
            kernel,
            energy,
            self.end if self.done else self.position,
            self.num_steps - self.done,
            chunk_size=_CHUNK_SIZE,
            context=context,
            generator=None if self.done else generator,
        )

    def add(self, chunk: Chains, snapshot: Snapshot) -> None:
        """Take a chunk into the means, and keep each ``thin``-th draw."""
        means = ChainMeans.of(self.axes, chunk.draws)
        rates = torch.stack([chunk.acceptance, chunk.diverging.to(chunk.acceptance)]).mean(dim=2)
        self.kept.append(
            chunk.draws[:, (self.thin - 1 - self.done) % self.thin :: self.thin].clone()
        )
        if self.done == 0:
            self.means, self.rates = means, rates
        size = chunk.draws.shape[1]
        self.done += size
        self.means = self.means.mixed(means, size / self.done)
        self.rates = torch.lerp(self.rates, rates, size / self.done)
        self.end = snapshot

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on."""
        return {
            "end": self.end,
            "done": self.done,
            "means": tuple(self.means),
            "rates": self.rates,
            "kept": self.kept,
        }

    def resume(self, content: dict[str, Any]) -> None:
        """Go on from a state."""
        end, device = content["end"], self.position.device
        self.end = Snapshot(
            position=end["position"].to(device),
            energy=end["energy"].to(device),
            gradient=end["gradient"].to(device),
            extra=tuple(part.to(device) for part in end["extra"]),
            generator=end["generator"],
        )
        self.done, self.kept = content["done"], content["kept"]
        self.means, self.rates = ChainMeans(*content["means"]), content["rates"]


@full_precision()
@torch.no_grad()
def principal_axes(
    kernel: Kernel,
    energy: Energy,
    position: Tensor,
    num_steps: int,
    generator: torch.Generator,
    context: Context = None,
    progress: Callable[[int], object] = lambda steps: None,
) -> tuple[PrincipalAxes, Tensor]:
    """Warm chains up; return the axes of the second half of their draws and where they end.

    The arguments are those of :func:`long_chains`.

    Raises:
        ValueError: As there, or z has one coordinate only, or one that does not move.
    """
    warm_up, done, dim = num_steps // 2, 0, position.shape[1]
    moments = Moments(torch.zeros(dim).double(), torch.zeros(dim, dim).double())
    chunks = sample_chunks(
        kernel,
        energy,
        position,
        num_steps,
        chunk_size=_CHUNK_SIZE,
        context=context,
        generator=generator,
    )
    for chunk, _ in chunks:
        late = chunk.draws[:, max(0, warm_up - done) :]
        done += chunk.draws.shape[1]
        progress(chunk.draws.shape[1])
        if late.numel():
            found = Moments.of(late.double().flatten(0, 1))
            moments = moments.mixed(found, late.shape[1] / (done - warm_up))
    return PrincipalAxes.of(moments), chunk.draws[:, -1].to(position)


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
    kernel, energy = HMC(num_leapfrogs).to(start), model.energy(x)
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
