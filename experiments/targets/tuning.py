"""The baselines: Hamiltonian Monte Carlo, tuned as well as a grid can."""

import time
from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple, cast

import torch
from torch import Tensor

from samplers import HMC, Kernel, Mass, Preconditioned, adapt, sample, seeded_generator
from samplers.densities import Target
from samplers.diagnostics import autocorrelation, ess_per_step

_TUNING_STEPS = 400
_WARM_UP_STEPS, _WARM_UP_LEAPFROGS = 400, 10
WARM_UP_GRADIENTS = _WARM_UP_STEPS * _WARM_UP_LEAPFROGS
_LENGTHS = (1, 2, 5, 10, 20, 50, 100)
_TUNING_STREAM, _WARM_UP_STREAM = 0, 1

Build = Callable[[int, float], Kernel]
"""Builds a kernel of so many leapfrogs and such a step size."""


class Tuned(NamedTuple):
    """The best of a grid."""

    kernel: Kernel
    settings: str
    gradients: int
    """Taken to find it, over all chains."""
    seconds: float


def baselines(
    target: Target, start: Tensor, num_leapfrogs: int, step_sizes: Iterable[float], seed: int
) -> dict[str, Tuned]:
    """Return HMC in five tunings.

    Arguments:
        target: What they sample from.
        start: Exact draws, (chain, D).
        num_leapfrogs: The learned sampler's, to which the paper held HMC.
        step_sizes: The grid for plain HMC.
        seed: Of the tuning runs.
    """
    grid = list(step_sizes)
    found = {
        "HMC, same leapfrogs": tune(target, start, HMC, [num_leapfrogs], grid, seed),
        "HMC, tuned": tune(target, start, HMC, _LENGTHS, grid, seed),
        "MALA, tuned": tune(target, start, HMC, [1], grid, seed),
    }
    for mass in ("diagonal", "dense"):
        found[f"HMC, {mass} mass, tuned"] = _preconditioned(target, start, mass, seed)
    return found


def tune(
    target: Target,
    start: Tensor,
    build: Build,
    lengths: Iterable[int],
    step_sizes: Iterable[float],
    seed: int,
) -> Tuned:
    """Return the kernel with the largest effective sample size per gradient on a grid."""
    began, gradients = time.perf_counter(), 0
    best, best_value = None, -1.0
    for length, step_size in product(lengths, step_sizes):
        kernel = build(length, step_size)
        generator = seeded_generator(start.device, seed, _TUNING_STREAM)
        draws = sample(kernel, target, start, _TUNING_STEPS, generator=generator).draws
        gradients += _TUNING_STEPS * length * len(start)
        value = ess_per_step(autocorrelation(draws, target.mean, target.covariance)).value / length
        if value > best_value:
            best, best_value = (kernel, length, step_size), value
    if best is None:
        raise ValueError("no step size of the grid moves the chains")
    kernel, length, step_size = best
    settings = f"ε {step_size:.3g}, {length} leapfrog{'s' if length > 1 else ''}"
    return Tuned(kernel, settings, gradients, time.perf_counter() - began)


def whitened(
    target: Target, start: Tensor, mass: Mass, generator: torch.Generator
) -> Preconditioned:
    """Return HMC in the coordinates that a warm-up of ``WARM_UP_GRADIENTS`` a chain has found."""
    kernel = HMC(_WARM_UP_LEAPFROGS)
    adapted = adapt(kernel, target, start, _WARM_UP_STEPS, mass=mass, generator=generator)
    return cast(Preconditioned, adapted.kernel)


def _preconditioned(target: Target, start: Tensor, mass: Mass, seed: int) -> Tuned:
    """Tune HMC in the coordinates that a warm-up has found."""
    began = time.perf_counter()
    generator = seeded_generator(start.device, seed, _WARM_UP_STREAM)
    adapted = whitened(target, start, mass, generator)

    def build(length: int, step_size: float) -> Kernel:
        return adapted.around(HMC(length, step_size))

    tuned = tune(target, start, build, _LENGTHS[:5], torch.linspace(0.2, 2.0, 10).tolist(), seed)
    gradients = tuned.gradients + WARM_UP_GRADIENTS * len(start)
    return tuned._replace(gradients=gradients, seconds=time.perf_counter() - began)
