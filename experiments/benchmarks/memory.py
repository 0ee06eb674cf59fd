"""The memory of a sampler update, and of long chains over their length."""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as activations

from dglm import long_chains, principal_axes
from experiments.benchmarks.cases import DEFAULT_TRAINING, Posterior, SamplerUpdate, Sizes
from experiments.shared.cli import CommandError
from samplers import HMC, seeded_generator

_MEBIBYTE = 2**20
_FORGET_PEAK = Path("/proc/self/clear_refs")


def memory(
    sizes: Sequence[Sizes] = (replace(DEFAULT_TRAINING, mh_steps=5), Sizes()),
    ways: Sequence[str] = ("eager", "compiled", "recomputed"),
    lengths: Sequence[int] = (250, 500, 1000),
) -> dict[str, Any]:
    """Measure each in a process of its own, so that none finds what another has left."""
    measured: dict[str, Callable[[], float]] = {}
    for each in sizes:
        for way in ways:
            name = f"update {each.mh_steps} × {each.leapfrogs}, {each}, {way}"
            measured[name] = partial(update_memory, each, way)
    for length in lengths:
        measured[f"64 chains of {length} HMC steps"] = partial(chain_memory, length)
    rows = []
    for name, measure in measured.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows.append({"work": name, "peak_mebibytes": process.submit(measure).result()})
    return {
        "title": "memory",
        "rows": rows,
        "note": "peak beyond what the process holds before, at the second time",
    }


def update_memory(sizes: Sizes, way: str) -> float:
    """Return the memory of a sampler update, MiB: eager, compiled, or so that it recomputes."""
    activations.activation_memory_budget = 0.0 if way == "recomputed" else 1.0
    return peak_memory(SamplerUpdate(sizes, compile=way != "eager"))


def chain_memory(length: int, sizes: Sizes = replace(DEFAULT_TRAINING, rows=64)) -> float:  # noqa: B008
    """Return the memory of long chains on one posterior, MiB."""
    case, kernel = Posterior(sizes), HMC(sizes.leapfrogs, 0.05)
    energy, generator = case.model.energy(case.x), seeded_generator("cpu", 0)
    axes, start = principal_axes(kernel, energy, case.z, 20, generator)

    def run() -> None:
        long_chains(kernel, energy, start, length, axes, generator)

    return peak_memory(run)


def peak_memory(work: Callable[[], object], device: str = "cpu") -> float:
    """Return what some work takes there at its peak beyond what is held before it, MiB.

    The second time: the first brings what is kept, such as compiled code and threads.

    Raises:
        CommandError: This system does not tell.
    """
    work()
    return peak_of_one(work, device)


def peak_of_one(work: Callable[[], object], device: str) -> float:
    """Do some work once; return what it takes there at its peak, MiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / _MEBIBYTE
    if not _FORGET_PEAK.exists():
        raise CommandError("the memory of the processor is measured on Linux alone")
    ctypes.CDLL(None).malloc_trim(0)  # give back what the first time has left
    _FORGET_PEAK.write_text("5")
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / _MEBIBYTE


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise CommandError(f"/proc/self/status has no {field}")
