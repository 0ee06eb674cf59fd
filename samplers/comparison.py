"""Which kernel's gradients are worth most: a table that tells, and races that choose."""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from samplers.chains import Chains, draw_chains, still_chains
from samplers.energy import Counted, Energy
from samplers.hmc import HMC
from samplers.kernel import Kernel, as_positions
from samplers.preconditioned import Preconditioned

LENGTHS = (1, 2, 3, 5, 8, 13, 20)
_MULTIPLES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
_SHORT, _LARGEST_OF_LONG = 3, 2.0
"""Leapfrogs up to which a step size may be above twice the warm-up's: few of them add up no error,
and may well be rejected half of the time."""
_ROUNDS = ((1, 3, 1.19), (4, 1, 1.09), (4, 1, 1.0))
"""Of each round the length, how many go on, and the ratio of the step sizes tried beside theirs."""
_FEWEST_DRAWS = 20
_FEWEST_TO_COMPARE = 4
"""Chains, and draws of each, of which ArviZ has an effective sample size."""
_BATCHES = 5
_SUSPECTS = 5
"""Coordinates that a race is judged by: looking at all of many takes longer than the run."""
CONVERGED = 1.01
"""The largest R̂ of chains that are said to agree."""


class Efficiency(NamedTuple):
    """The worst bulk effective sample sizes and R̂ over coordinates, of x and of x²."""

    ess: float
    """Of x, independent draws a step."""
    ess_squares: float
    """Of x²: a chain that leaps from side to side has a large one of x and a small one of x²."""
    r_hat: float
    """The larger one; NaN where a coordinate never changes."""

    @property
    def worst(self) -> float:
        """The smaller effective sample size; 0 where nothing moves."""
        return float(np.nan_to_num(min(self.ess, self.ess_squares)))


def efficiency(draws: Tensor, num_suspects: int | None = None) -> Efficiency:
    """Return what a step is worth, and R̂, by ArviZ's formulas.

    Arguments:
        draws: (chain, draw, D).
        num_suspects: Look only at so many coordinates of x, and as many of x²: those with the
            largest autocorrelation from a draw to the next, among which the worst one is.
    """
    from arviz_stats.base import array_stats

    found = []
    for quantity in (draws.double(), draws.double().square()):
        suspects = _suspects(quantity, num_suspects) if num_suspects else slice(None)
        values = quantity[..., suspects].cpu().numpy()
        moves = np.ptp(values, axis=(0, 1)) > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            ess = array_stats.ess(values, method="bulk", chain_axis=0, draw_axis=1)
            r_hat = array_stats.rhat(values, chain_axis=0, draw_axis=1)
        found.append((np.where(moves, ess, np.nan).min(), np.where(moves, r_hat, np.nan).max()))
    steps = draws.shape[0] * draws.shape[1]
    (plain, r_hat), (squares, other) = found
    return Efficiency(float(plain / steps), float(squares / steps), float(np.maximum(r_hat, other)))


_SHOWN = {
    "ess_per_gradient": "ESS/gradient",
    "ess_per_second": "ESS/second",
    "ess": "x, a step",
    "ess_squares": "x², a step",
    "r_hat": "R̂",
    "acceptance": "acceptance",
    "diverging": "diverging",
    "stuck": "stuck",
}


def _suspects(draws: Tensor, count: int) -> Tensor:
    centred = draws - draws.mean(dim=(0, 1))
    together = (centred[:, 1:] * centred[:, :-1]).mean(dim=(0, 1))
    share = together / centred.square().mean(dim=(0, 1))
    return share.nan_to_num(torch.inf).topk(min(count, len(share))).indices


class Comparison(dict[str, list[Any]]):
    """A table of samplers, a row each: print it, or ``pandas.DataFrame(comparison)``.

    Its columns: sampler; ess_per_gradient and ess_per_second, the worst bulk effective sample size
    over coordinates, of x and of x², over what it cost; ess and ess_squares, the worst a step of
    each; r_hat, the largest; acceptance; diverging, the share of steps; stuck, how many chains
    never moved; gradients_per_step and seconds.
    """

    def add(
        self,
        sampler: str,
        chains: Chains,
        gradients_per_step: float,
        seconds: float,
        num_suspects: int | None = None,
    ) -> Efficiency:
        """Add the row of a sampler from its chains, whichever library they are from.

        With ``num_suspects`` only so many coordinates are looked at, see :func:`efficiency`.
        """
        found = efficiency(chains.draws, num_suspects)
        steps = chains.draws.shape[0] * chains.draws.shape[1]
        row = {
            "sampler": sampler,
            "ess_per_gradient": found.worst / gradients_per_step,
            "ess_per_second": found.worst * steps / seconds,
            "ess": found.ess,
            "ess_squares": found.ess_squares,
            "r_hat": found.r_hat,
            "acceptance": float(chains.acceptance.mean()),
            "diverging": float(chains.diverging.float().mean()),
            "stuck": int(still_chains(chains.draws).sum()),
            "gradients_per_step": gradients_per_step,
            "seconds": seconds,
        }
        for name, value in row.items():
            self.setdefault(name, []).append(value)
        return found

    def row(self, sampler: str) -> dict[str, Any]:
        """Return the row of a sampler."""
        place = self["sampler"].index(sampler)
        return {name: column[place] for name, column in self.items()}

    def __rich__(self) -> Table:
        table = Table(box=SIMPLE, title="ESS and R̂ of the worst coordinate, of x and of x²")
        table.add_column("sampler", overflow="fold")
        for name in _SHOWN.values():
            table.add_column(name, justify="right", no_wrap=True)
        for place, sampler in enumerate(self.get("sampler", [])):
            table.add_row(sampler, *(f"{self[name][place]:.3g}" for name in _SHOWN))
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def compare(
    kernels: Mapping[str, Kernel],
    energy: Energy,
    position: Tensor,
    num_draws: int = 1000,
    *,
    generator: torch.Generator | None = None,
) -> Comparison:
    """Run several kernels from the same start and return the table that tells them apart.

    A step costs as many gradients as it evaluates the energy. Compile the kernels that you would
    run compiled: a first step, which compiles, is not timed.

    Arguments:
        kernels: By name; they are not adapted.
        energy: U, from (chain, dim) to (chain,).
        position: Where the chains start, (chain, dim), at least 4 of them: best where a warm-up
            left them.
        num_draws: Steps of each chain.
        generator: Of the noise.

    Warns:
        UserWarning: Chains of some kernel never moved, have R̂ above 1.01, or an
            effective sample size of x² of less than a tenth of that of x.

    Raises:
        ValueError: There are no kernels, or fewer than four chains or draws, of which nothing can
            be said; or the energy or its gradient is not finite where a chain starts.

    Example:
        >>> import torch
        >>> from samplers import HMC, compare
        >>> energy = lambda x: 0.5 * x.square().sum(dim=-1)
        >>> kernels = {"short": HMC(1, 1.0), "long": HMC(3, 0.7)}
        >>> table = compare(kernels, energy, torch.randn(50, 2))
        >>> table["sampler"]
        ['short', 'long']
    """
    position = as_positions(position)
    if not kernels or min(len(position), num_draws) < _FEWEST_TO_COMPARE:
        raise ValueError(
            f"compare takes at least a kernel, {_FEWEST_TO_COMPARE} chains and as many draws, got "
            f"{len(kernels)}, {len(position)} and {num_draws}"
        )
    table = Comparison()
    for name, kernel in kernels.items():
        counted, throwaway = Counted(energy), torch.Generator(position.device)
        state = kernel.init(position, energy)
        copy(kernel).step(state, counted, kernel.noise(state, throwaway))  # not compiled
        draw_chains(kernel, energy, position, kernel.steps_per_call, generator=throwaway)
        gradients = counted.count / len(position)
        began = time.perf_counter()
        chains = draw_chains(kernel, energy, position, num_draws, generator=generator)
        table.add(name, chains, gradients, time.perf_counter() - began)
    warn_of_misleading(table)
    return table


def warn_of_misleading(table: Comparison) -> None:
    """Warn, once for a table, of chains whose effective sample size should not be believed."""
    rows = [table.row(name) for name in table.get("sampler", [])]
    stuck = [f"{row['stuck']} of {row['sampler']}" for row in rows if row["stuck"]]
    apart = [
        f"{row['sampler']} ({row['r_hat']:.2f})" for row in rows if not row["r_hat"] <= CONVERGED
    ]
    leaping = [row["sampler"] for row in rows if row["ess_squares"] < 0.1 * row["ess"]]
    told = []
    if stuck:
        told.append(
            f"chains never moved, {', '.join(stuck)}: start them closer to where the density is, "
            "or take a smaller step size"
        )
    if apart:
        told.append(
            f"chains do not agree, R̂ > {CONVERGED}, of {', '.join(apart)}: effective sample sizes "
            "mean nothing there; warm up or run longer, and start in every mode that you know of"
        )
    if leaping:
        told.append(
            f"the spread mixes ten times more slowly than the centre in chains of "
            f"{', '.join(leaping)}, which leap from side to side: believe the worst of x and x²"
        )
    if told:
        warnings.warn("; ".join(told), stacklevel=3)


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
    gradient, has the largest lower bound over five batches of chains, if that exceeds 1; the bounds
    hold with 95 % for all kernels together. A kernel some of whose chains stay in the tails for
    long has a low one.

    Arguments:
        kernels: By name.
        energy: U, from (B, D) to (B,).
        position: Where the chains start, (B, D), at least 20 of them.
        gradients: Of each chain and kernel.
        generator: Of the noise.
    """
    from scipy.special import stdtrit

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
        ends[name] = chains.draws[:, -1].to(position.device, copy=True)  # not the whole draws
    first, *others = kernels
    bar = max(CONVERGED, table.row(first)["r_hat"])
    # Student's, after Bonferroni.
    quantile = float(stdtrit(_BATCHES - 1, 1 - 0.05 / max(1, len(others))))
    best, largest = first, 0.0
    for name in others:
        row, ratio = table.row(name), batches[name] - batches[first]
        bound = float(ratio.mean() - quantile * ratio.std() / math.sqrt(_BATCHES))
        sound = row["stuck"] == 0 and row["r_hat"] <= bar
        if sound and bound > largest:
            best, largest = name, bound
    return Raced(table, best, ends[best])
