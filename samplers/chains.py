"""Long chains: many draws of a kernel, chunk by chunk, that can stop and go on."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from samplers.energy import Energy, State
from samplers.kernel import Context, Info, Kernel, Noise, finite_start, transition
from samplers.random import random_state

ENOUGH_TO_MOVE = 50
"""Steps in which a chain that is not stuck moves."""

CHUNK_SIZE = 100
"""Draws that wait on the device until they move to the CPU together."""


class Chains(NamedTuple):
    """The draws of many chains and their statistics, on the CPU."""

    draws: Tensor
    """Positions, (chain, draw, dim)."""
    energy: Tensor
    """U at the draws in nats, (chain, draw)."""
    acceptance: Tensor
    """Mean acceptance probability of the steps since the draw before, (chain, draw)."""
    diverging: Tensor
    """Whether one of these steps failed, (chain, draw), boolean."""

    def export(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the chains in ArviZ's schema, as arrays.

        The schema's ``energy`` is that of position and momentum; U is its ``-lp``.
        """
        return {
            "posterior": {"position": self.draws.numpy()},
            "sample_stats": {
                "lp": -self.energy.numpy(),
                "acceptance_rate": self.acceptance.numpy(),
                "diverging": self.diverging.numpy(),
            },
        }

    def to_arviz(self) -> Any:
        """Return the chains as ArviZ's own data: a DataTree, or InferenceData before ArviZ 1.

        Raises:
            ImportError: ArviZ is not installed.
        """
        import arviz

        groups = self.export()
        takes_groups = "posterior" in inspect.signature(arviz.from_dict).parameters
        return arviz.from_dict(**groups) if takes_groups else arviz.from_dict(groups)


class Snapshot(TypedDict):
    """What chains need to go on, bit for bit: a plain dictionary of tensors, for ``torch.save``."""

    position: Tensor
    energy: Tensor
    gradient: Tensor
    extra: tuple[Tensor, ...]
    """As in :class:`samplers.State`, which these four are."""
    generator: Tensor
    """The state of the generator of the noise, torch's global one too."""


def sample(
    kernel: Kernel,
    energy: Energy,
    position: Tensor,
    num_draws: int,
    *,
    thin: int = 1,
    context: Context = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], object] | None = None,
) -> Chains:
    """Run every chain for ``num_draws * thin`` steps and keep each ``thin``-th state.

    Arguments:
        kernel: HMC, L2HMC or another kernel; it is not adapted.
        energy: U, from (chain, dim) to (chain,).
        position: Where the chains start, (chain, dim).
        num_draws: Draws to keep of each chain.
        thin: Steps from one kept draw to the next.
        context: As returned by ``kernel.embed``.
        generator: Of the noise; without one, torch's global generator.
        progress: Called now and then with the number of draws made so far.

    Raises:
        ValueError: A count is below 1, or the energy or its gradient is not finite where a chain
            starts.

    Warns:
        UserWarning: Of chains that never moved.

    Example:
        >>> import torch
        >>> from samplers import HMC, sample
        >>> energy = lambda x: 0.5 * x.square().sum(dim=-1)
        >>> chains = sample(HMC(num_leapfrogs=5, step_size=0.3), energy, torch.zeros(4, 2), 10)
        >>> chains.draws.shape
        torch.Size([4, 10, 2])
        >>> chains.export()["posterior"]["position"].shape  # chains.to_arviz() for ArviZ
        (4, 10, 2)
    """
    chains = draw_chains(
        kernel,
        energy,
        position,
        num_draws,
        progress,
        thin=thin,
        context=context,
        generator=generator,
    )
    warn_of_still(still_chains(chains.draws), num_draws, num_draws * thin)
    return chains


def draw_chains(
    kernel: Kernel,
    energy: Energy,
    position: Tensor,
    num_draws: int,
    progress: Callable[[int], object] | None = None,
    **options: Any,
) -> Chains:
    """Do what :func:`sample` does, for those who look for stuck chains themselves: no warning."""
    chunks = _begun(kernel, energy, position, num_draws, CHUNK_SIZE, **options)
    return concatenate(chunks, num_draws, progress)


def warn_of_still(still: Tensor, num_draws: int, num_steps: int) -> None:
    """Warn of chains, (chain,), boolean, that never moved in so many draws and steps."""
    if num_draws > 1 and num_steps >= ENOUGH_TO_MOVE and still.any():
        warnings.warn(
            f"{int(still.sum())} of {len(still)} chains did not move in {num_steps} steps: start "
            "them closer to where the density is, or take a smaller step size (adapt)",
            stacklevel=3,
        )


def concatenate(
    chunks: Iterable[tuple[Chains, Snapshot]],
    num_draws: int,
    progress: Callable[[int], object] | None = None,
) -> Chains:
    """Return the chunks of :func:`sample_chunks`, of so many draws in all, as one."""
    kept: list[Tensor] = []
    done = 0
    for chunk, _ in chunks:
        # Room for all from the start: chunks put together at the end would be there twice.
        kept = kept or [part.new_empty((len(part), num_draws, *part.shape[2:])) for part in chunk]
        begin, done = done, done + chunk.draws.shape[1]
        for field, part in zip(kept, chunk, strict=True):
            field[:, begin:done] = part
        if progress is not None:
            progress(done)
    return Chains(*kept)


def still_chains(draws: Tensor) -> Tensor:
    """Return which chains of draws (chain, draw, dim) never move, (chain,), boolean."""
    return torch.stack([(chain == chain[:1]).all() for chain in draws])


def sample_chunks(
    kernel: Kernel,
    energy: Energy,
    start: Tensor | Snapshot,
    num_draws: int,
    *,
    chunk_size: int = CHUNK_SIZE,
    thin: int = 1,
    context: Context = None,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Chains, Snapshot]]:
    """Run chains as :func:`sample` does, at constant memory: yield the draws in chunks.

    With every chunk comes a snapshot of the chains at its end. A run that starts from it, in
    another process too, repeats what the uninterrupted one would have drawn::

        for chunk, snapshot in sample_chunks(kernel, energy, start, 100_000):
            total += chunk.draws.sum(dim=1)
            torch.save(snapshot, path)

    Arguments:
        kernel: HMC, L2HMC or another kernel; it is not adapted.
        energy: U, from (chain, dim) to (chain,).
        start: Where the chains start, (chain, dim), or a snapshot, of this very energy.
        num_draws: Draws of each chain, from the start on, in all chunks together.
        chunk_size: Draws of each chain in a chunk; fewer in the last one.
        thin: Steps from one kept draw to the next.
        context: As returned by ``kernel.embed``.
        generator: Of the noise; without one, torch's global generator. A snapshot brings its own.

    Raises:
        ValueError: A count is below 1, the energy or its gradient is not finite where a chain
            starts, or a snapshot is of another energy or has a generator beside it.
        TypeError: A count is no integer, or the generator none of torch's.

    Warns:
        UserWarning: After the last chunk, of chains that never moved.
    """
    chunks = _begun(kernel, energy, start, num_draws, chunk_size, thin, context, generator)
    return _watched(chunks, thin)


def _begun(
    kernel: Kernel,
    energy: Energy,
    start: Tensor | Snapshot,
    num_draws: int,
    chunk_size: int,
    thin: int = 1,
    context: Context = None,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Chains, Snapshot]]:
    """Return the chunks of :func:`sample_chunks`, once all arguments are checked."""
    for name, value in (("num_draws", num_draws), ("thin", thin), ("chunk_size", chunk_size)):
        if not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(
            f"generator must be a torch.Generator, got {generator!r}: "
            "torch.Generator().manual_seed(0) is one of seed 0"
        )
    if num_draws < 1 or thin < 1:
        raise ValueError(f"num_draws and thin must be at least 1, got {num_draws} and {thin}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if not isinstance(start, dict):
        state = finite_start(kernel, energy, start)
    elif generator is None:
        state = State(start["position"], start["energy"], start["gradient"], start["extra"])
        _check_energy(kernel, energy, state)
        generator = torch.Generator(state.position.device)
        generator.set_state(start["generator"].cpu())
    else:
        raise ValueError("a snapshot brings its own generator: pass one of the two")
    sizes = [chunk_size] * (num_draws // chunk_size)
    sizes += [num_draws % chunk_size] if num_draws % chunk_size else []
    return _chunks(kernel, energy, state, sizes, thin, context, generator)


def _watched(
    chunks: Iterator[tuple[Chains, Snapshot]], thin: int
) -> Iterator[tuple[Chains, Snapshot]]:
    done, still, first = 0, torch.ones((), dtype=torch.bool), None
    for chunk, snapshot in chunks:
        first = chunk.draws[:, :1].clone() if first is None else first
        still = still & (chunk.draws == first).flatten(1).all(dim=1)
        done += chunk.draws.shape[1]
        yield chunk, snapshot
    warn_of_still(still, done, done * thin)


@torch.no_grad()
def _check_energy(kernel: Kernel, energy: Energy, state: State) -> None:
    """Raise ValueError where a state is stale: its acceptances would be wrong without a word."""
    now = kernel.init(state.position, energy).energy
    rounding = 100 * torch.finfo(now.dtype).eps
    if not torch.allclose(now, state.energy, rtol=rounding, atol=1e-3):
        raise ValueError(
            "the snapshot is of another energy than this one: start from its position, "
            'snapshot["position"]'
        )


@torch.no_grad()
def _chunks(
    kernel: Kernel,
    energy: Energy,
    state: State,
    sizes: list[int],
    thin: int,
    context: Context,
    generator: torch.Generator | None,
) -> Iterator[tuple[Chains, Snapshot]]:
    for size in sizes:
        kept, every = [], []
        for after, info in _steps(kernel, energy, state, size * thin, context, generator):
            state = after
            every.append((info.acceptance, info.diverging))
            if len(every) % thin == 0:
                kept.append((state.position, state.energy))
        position, potential = _stacked(kept)
        acceptance, diverging = (field.unflatten(1, (size, thin)) for field in _stacked(every))
        parts = position, potential, acceptance.mean(dim=2), diverging.any(dim=2)
        chains = Chains(*(part.cpu() for part in parts))
        yield (
            chains,
            Snapshot(
                position=state.position,
                energy=state.energy,
                gradient=state.gradient,
                extra=state.extra,
                generator=random_state(generator, state.position.device),
            ),
        )


def _steps(
    kernel: Kernel,
    energy: Energy,
    state: State,
    count: int,
    context: Context,
    generator: torch.Generator | None,
) -> Iterator[tuple[State, Info]]:
    """Yield what so many steps return; those that do not fill a call are taken one by one.

    So a kernel is compiled for two numbers of steps at most.
    """
    together = kernel.steps_per_call
    whole_calls = count // together if together > 1 else 0
    for _ in range(whole_calls):
        noises = [kernel.noise(state, generator) for _ in range(together)]
        done = kernel.compiled(_several)(kernel, state, energy, noises, context)
        yield from done
        state, _ = done[-1]
    for _ in range(count - together * whole_calls):
        state, info = kernel.step(state, energy, kernel.noise(state, generator), context)
        yield state, info


def _several(
    kernel: Kernel, state: State, energy: Energy, noises: list[Noise], context: Context
) -> list[tuple[State, Info]]:
    """Take a step for each noise."""
    done = []
    for noise in noises:
        state, info = transition(kernel, state, energy, noise, context)
        done.append((state, info))
    return done


def _stacked(steps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return both fields of all steps, (chain, step, …)."""
    return [torch.stack(field, dim=1) for field in zip(*steps, strict=True)]
