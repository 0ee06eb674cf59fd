"""Races between kernels: which gives the most independent draws a gradient."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.chains import draw_chains
from samplers.comparison import Comparison, efficiency
from samplers.energy import Energy
from samplers.hmc import HMC
from samplers.kernel import Kernel
from samplers.preconditioned import Preconditioned

LENGTHS = (1, 2, 3, 5, 8, 13, 20)
_MULTIPLES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
_SHORT, _LARGEST_OF_LONG = 3, 2.0
"""Leapfrogs up to which a step size may be above twice the warm-up's: few of them add up no error,
and may well be rejected half of the time."""
_ROUNDS = ((1, 3, 1.19), (4, 1, 1.09), (4, 1, 1.0))
"""Of each round the length, how many go on, and the ratio of the step sizes tried beside theirs."""
_FEWEST_DRAWS = 20
_BATCHES = 5
_SUSPECTS = 5
"""Coordinates that a race is judged by: looking at all of many takes longer than the run."""
_STUDENT = 2.132
"""The one-sided 95 % quantile of Student's t with four degrees of freedom."""
CONVERGED = 1.01
"""The largest R̂ of chains that are said to agree."""


def tune_hmc(
    warm: Preconditioned,
    energy: Energy,
    position: Tensor,
    gradients: int,
    generator: torch.Generator | None = None,
    lengths: Sequence[int] = LENGTHS,
) -> Preconditioned:
    """Return HMC of the length and step size with the best worst ESS of x and x² per gradient.

    Three rounds: a grid around the warm-up's step size, and far above it for short trajectories;
    then its best three, then the best one, with step sizes next to theirs, for four times as long.

    Arguments:
        warm: HMC after a warm-up, whose coordinates are kept.
        energy: U, from (B, D) to (B,).
        position: Where the warm-up left the chains, (B, D).
        gradients: Of each chain and each kernel of the first round.
        generator: Of the noise.
        lengths: Leapfrogs to choose from.
    """
    step_size = float(warm.step_size.detach())
    grid = [
        (length, step_size * factor)
        for length in lengths
        for factor in _MULTIPLES
        if length <= _SHORT or factor <= _LARGEST_OF_LONG
    ]
    for share, finalists, ratio in _ROUNDS:
        values = {}
        for length, epsilon in grid:
            kernel = warm.with_kernel(HMC(length, epsilon)).to(position)
            steps = max(_FEWEST_DRAWS, share * gradients // length)
            draws = draw_chains(kernel, energy, position, steps, generator=generator).draws
            # Chains that stand still are worth one draw each, however long they are.
            values[length, epsilon] = (efficiency(draws, _SUSPECTS).worst - 1 / steps) / length
        best = sorted(values, key=lambda each: -values[each])[:finalists]
        beside = (1 / ratio, 1.0, ratio)
        grid = [(length, epsilon * factor) for length, epsilon in best for factor in beside]
    length, epsilon = best[0]
    return warm.with_kernel(HMC(length, epsilon)).to(position)


class Raced(NamedTuple):
    """What a race says."""

    table: Comparison
    best: str
    """The kernel that is surely better than the first one, else the first."""
    position: Tensor
    """Where its chains are, (B, D)."""

    @property
    def converged(self) -> bool:
        """Whether the chains of the best one agree, R̂ ≤ 1.01, and all of them move."""
        row = self.table.row(self.best)
        return row["r_hat"] <= CONVERGED and row["stuck"] == 0


def race(
    kernels: Mapping[str, Kernel],
    energy: Energy,
    position: Tensor,
    gradients: int,
    generator: torch.Generator | None = None,
) -> Raced:
    """Run kernels for equally many gradients; the first gives way only to a surely better one.

    Out are kernels with a chain that never moved, or with R̂ above 1.01 and above the first one's.
    Of the others the one is taken whose ratio to the first, of the worst ESS of x and x² per
    gradient, has the largest lower bound of 95 % over five batches of chains, if that exceeds 1:
    a kernel some of whose chains stay in the tails for long has a low one.

    Arguments:
        kernels: By name.
        energy: U, from (B, D) to (B,).
        position: Where the chains start, (B, D), at least 20 of them.
        gradients: Of each chain and kernel.
        generator: Of the noise.
    """
    table, batches, ends = Comparison(), {}, {}
    for name, kernel in kernels.items():
        steps = max(10 * _FEWEST_DRAWS, gradients // kernel.num_leapfrogs)
        began = time.perf_counter()
        chains = draw_chains(kernel, energy, position, steps, generator=generator)
        seconds = time.perf_counter() - began
        table.add(name, chains, kernel.num_leapfrogs, seconds, _SUSPECTS)
        parts = chains.draws.chunk(_BATCHES)
        worst = torch.tensor(
            [efficiency(part, _SUSPECTS).worst for part in parts], dtype=torch.float64
        )
        batches[name] = (worst / kernel.num_leapfrogs).clamp(min=1e-12).log()
        ends[name] = chains.draws[:, -1].to(position.device)
    first, *others = kernels
    bar = max(CONVERGED, table.row(first)["r_hat"])
    best, largest = first, 0.0
    for name in others:
        row, ratio = table.row(name), batches[name] - batches[first]
        bound = float(ratio.mean() - _STUDENT * ratio.std() / math.sqrt(_BATCHES))
        sound = row["stuck"] == 0 and row["r_hat"] <= bar
        if sound and bound > largest:
            best, largest = name, bound
    return Raced(table, best, ends[best])
