"""The baselines: Hamiltonian Monte Carlo, tuned as well as a grid can."""

import time
from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

from torch import Tensor

from experiments.targets.measure import Reference
from samplers import HMC, Kernel, Mass, Preconditioned, Target, adapt, sample, seeded_generator

_WARM_UP_LEAPFROGS = 10
_LENGTHS = (1, 2, 5, 10, 20, 50, 100)
_MULTIPLES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
_TUNING_STREAM, _WARM_UP_STREAM = 0, 1


class Tuned(NamedTuple):
    """The best of a grid."""

    kernel: Kernel
    settings: str
    gradients: int
    """Taken to find it, over all chains."""
    seconds: float


def baselines(
    target: Target, start: Tensor, num_leapfrogs: int, num_steps: int, seed: int
) -> dict[str, Tuned]:
    """Return HMC in five tunings, the cost of its warm-up included.

    Arguments:
        target: What they sample from.
        start: Exact draws, (chain, D).
        num_leapfrogs: The learned sampler's, to which the paper held HMC.
        num_steps: Of the comparison, which sets that of the tuning runs.
        seed: Of the tuning runs.
    """
    grids: dict[Mass, dict[str, Sequence[int]]] = {
        "unit": {
            "HMC, same leapfrogs": [num_leapfrogs],
            "HMC, tuned": _LENGTHS,
            "MALA, tuned": [1],
        },
        "diagonal": {"HMC, diagonal mass, tuned": _LENGTHS},
        "dense": {"HMC, dense mass, tuned": _LENGTHS},
    }
    found = {}
    for mass, named in grids.items():
        began = time.perf_counter()
        warm = warmed_up(target, start, mass, num_steps, seed)
        seconds = time.perf_counter() - began
        gradients = warm_up_gradients(num_steps) * len(start)
        for name, lengths in named.items():
            tuned = tune(target, start, warm, lengths, num_steps, seed)
            found[name] = tuned._replace(
                gradients=gradients + tuned.gradients, seconds=seconds + tuned.seconds
            )
    return found


def warmed_up(target: Target, start: Tensor, mass: Mass, num_steps: int, seed: int) -> Kernel:
    """Return HMC after a warm-up, a fifth as long as the comparison."""
    generator = seeded_generator(start.device, seed, _WARM_UP_STREAM)
    kernel = HMC(_WARM_UP_LEAPFROGS)
    return adapt(kernel, target, start, num_steps // 5, mass=mass, generator=generator).kernel


def warm_up_gradients(num_steps: int) -> int:
    """Return the gradients that :func:`warmed_up` takes of each chain."""
    return num_steps // 5 * _WARM_UP_LEAPFROGS


def tune(
    target: Target,
    start: Tensor,
    warm: Kernel,
    lengths: Iterable[int],
    num_steps: int,
    seed: int,
) -> Tuned:
    """Return the kernel on a grid whose smaller effective sample size per gradient is largest.

    The smaller one of x and of x²: chains that step from side to side, as HMC of half a period
    does on a Gaussian, look perfect in x and do not mix at all. The grid is of lengths, and of
    step sizes around that of the warm-up, in the warm-up's coordinates.
    """
    began, reference = time.perf_counter(), Reference(target)
    gradients, best, best_value = 0, None, 0.0
    for length, multiple in product(lengths, _MULTIPLES):
        # As many gradients for each length, within bounds.
        steps = min(num_steps // 5, max(num_steps // 33, num_steps // length))
        moving: Kernel = HMC(length, multiple * float(warm.step_size))
        if isinstance(warm, Preconditioned):
            moving = warm.with_kernel(moving)
        generator = seeded_generator(start.device, seed, _TUNING_STREAM)
        draws = sample(moving, target, start, steps, generator=generator).draws
        gradients += steps * length * len(start)
        value = reference.efficiency(draws) / length
        if value > best_value:
            best, best_value = moving, value
    if best is None:
        raise ValueError(
            f"no step size of the grid around {float(warm.step_size):.3g} moves the chains: give "
            "a longer warm-up, with more --num_steps"
        )
    return Tuned(best, settings_of(best), gradients, time.perf_counter() - began)


def settings_of(kernel: Kernel) -> str:
    """Return a kernel's step size and leapfrogs in words."""
    leapfrogs = f"{kernel.num_leapfrogs} leapfrog{'s' if kernel.num_leapfrogs > 1 else ''}"
    return f"ε {float(kernel.step_size.detach()):.3g}, {leapfrogs}"
