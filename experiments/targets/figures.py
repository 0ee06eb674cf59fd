"""Pictures of the comparison: autocorrelation, chains over the density, what was learned."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from torch import Tensor

from experiments.targets.measure import Measured
from samplers import (
    L2HMC,
    GaussianMixture,
    GaussianTarget,
    Kernel,
    RoughWell,
    Target,
    seeded_generator,
)

_PATHS = 8
_TRACE_STEPS = 60
_GRID = 200


def draw_figures(folder: Path, target: Target, kernel: Kernel, lines: list[Measured]) -> None:
    """Write autocorrelation.png, learned.png and, for targets in the plane, chains.png."""
    draw_autocorrelation(folder / "autocorrelation.png", lines)
    if target.dim == 2:
        draw_chains(folder / "chains.png", target, lines)
    if isinstance(kernel, L2HMC):
        draw_learned(folder / "learned.png", target, kernel, lines)


def draw_autocorrelation(path: Path, lines: list[Measured]) -> None:
    """Draw ρ over the gradients that a lag costs."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for line in lines:
        gradients = torch.arange(len(line.correlation)) * line.row["gradients_per_step"]
        axes.plot(gradients[1:], line.correlation[1:], label=line.row["sampler"], linewidth=1.2)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set(xscale="log", xlabel="gradient evaluations of a chain", ylabel="autocorrelation of x")
    axes.set_xlim(right=4000)
    axes.set_ylim(-1.05, 1.05)
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_chains(path: Path, target: Target, lines: list[Measured]) -> None:
    """Draw the first steps of one chain of each sampler over the density."""
    columns = min(len(lines), 4)
    rows = -(-len(lines) // columns)
    size = (3 * columns, 3 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    limits = _limits(target)
    for axes, line in zip(grid.flat, lines, strict=False):
        _density(axes, target, limits)
        trace = line.draws[0, :_TRACE_STEPS]
        axes.plot(*trace.T, ".-", color="tab:red", linewidth=0.6, markersize=3)
        axes.set_title(line.row["sampler"], fontsize=9)
    for axes in grid.flat[len(lines) :]:
        axes.set_visible(False)
    figure.suptitle(f"{_TRACE_STEPS} steps of one chain", fontsize=10)
    _save(figure, path)


def draw_learned(path: Path, target: Target, kernel: L2HMC, lines: list[Measured]) -> None:
    """Draw what the kernel has learned: the picture that suits the target."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    if isinstance(target, RoughWell):
        _gradient_factors(axes, target, kernel)
    elif isinstance(target, GaussianMixture):
        _crossing_energies(axes, target, kernel)
    elif isinstance(target, GaussianTarget) and target.dim > 2:
        _relative_moves(axes, target, lines)
    else:
        _proposal_paths(axes, target, kernel)
    _save(figure, path)


class _Recorder:
    """A target that remembers where it was evaluated: the leapfrogs of a trajectory."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.path: list[Tensor] = []

    def __call__(self, position: Tensor) -> Tensor:
        self.path.append(position.detach())
        return self.target(position)


def _trajectories(target: Target, kernel: L2HMC, count: int) -> tuple[Tensor, Tensor]:
    """Return positions along proposals from exact draws, (M + 1, count, D), and acceptances."""
    generator = seeded_generator("cpu", 0)
    recorder = _Recorder(target)
    with torch.no_grad():
        state = kernel.init(target.sample(count, generator), recorder)
        _, info = kernel.step(state, recorder, kernel.noise(state, generator))
    return torch.stack(recorder.path), info.acceptance


def _gradient_factors(axes: Axes, target: Target, kernel: L2HMC) -> None:
    """Histogram exp(ε Q_v), the factor that the network puts on the gradient."""
    positions, _ = _trajectories(target, kernel, 500)
    for step in (0, kernel.num_leapfrogs // 2, kernel.num_leapfrogs - 1):
        state = kernel.init(positions[step], target)
        with torch.no_grad():
            time = kernel.times[step].expand(len(state.position), 2)
            update = kernel.momentum_network(state.position, state.gradient, time, None)
            factor = torch.exp(kernel.step_size * update.gate).flatten()
        axes.hist(factor.numpy(), bins=60, histtype="step", density=True, label=f"leapfrog {step}")
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.set(xlabel="factor on the gradient, exp(ε Q)", ylabel="density")
    axes.legend(fontsize=8)
    axes.set_title("1: the gradient as it is; below, damped; above, amplified", fontsize=10)


def _crossing_energies(axes: Axes, target: GaussianMixture, kernel: L2HMC) -> None:
    """Draw the energy along accepted proposals that end in another mode."""
    positions, acceptance = _trajectories(target, kernel, 2000)
    modes = [target.responsibilities(positions[place]).argmax(dim=-1) for place in (0, -1)]
    crossing = ((modes[0] != modes[1]) & (acceptance > 0.5)).nonzero().flatten()
    for index in crossing[:_PATHS]:
        energy = target(positions[:, index])
        axes.plot(energy, ".-", linewidth=1)
    share = len(crossing) / positions.shape[1]
    axes.set(xlabel="leapfrog", ylabel="energy U, nats")
    axes.set_title(
        f"Proposals into the other mode, accepted with A > 0.5: {share:.1%} of all", fontsize=10
    )


def _relative_moves(axes: Axes, target: Target, lines: list[Measured]) -> None:
    """Draw the root mean square move of each coordinate in its standard deviations."""
    deviations = target.covariance.diagonal().sqrt()
    for line in lines:
        move = line.draws.diff(dim=1).square().mean(dim=(0, 1)).sqrt()
        axes.plot(deviations, move / deviations, ".-", label=line.row["sampler"], linewidth=1)
    axes.axhline(2**0.5, color="0.6", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="standard deviation σ of the coordinate")
    axes.set_ylabel("root mean square move of a step / σ")
    axes.legend(fontsize=7)
    axes.set_title("Line: independent draws, √2", fontsize=10)


def _proposal_paths(axes: Axes, target: Target, kernel: L2HMC) -> None:
    """Draw the leapfrogs of some proposals over the density."""
    positions, _ = _trajectories(target, kernel, _PATHS)
    if isinstance(target, GaussianTarget):
        # On its own scale a narrow Gaussian is a line: its principal axes, each in its deviation.
        positions = (positions - target.mean) @ target.whitening
        for radius in (1, 2, 3):
            axes.add_patch(Circle((0, 0), radius, fill=False, color="0.6", linewidth=0.8))
        axes.set(xlabel="along the narrow axis / σ", ylabel="along the wide axis / σ")
        axes.set_aspect("equal", adjustable="datalim")
    else:
        _density(axes, target, _limits(target))
    for path in positions.unbind(dim=1):
        axes.plot(*path[:, :2].T, ".-", linewidth=0.9, markersize=4)
        axes.plot(*path[0, :2], "ko", markersize=4)
    axes.set_title("Leapfrogs of proposals; black: where they start", fontsize=10)


def _limits(target: Target) -> Tensor:
    """Return the ends of the axes, (2, 2)."""
    draws = target.sample(5000, seeded_generator("cpu", 0))[:, :2]
    low, high = draws.min(dim=0).values, draws.max(dim=0).values
    return torch.stack([low - 0.05 * (high - low), high + 0.05 * (high - low)])


def _density(axes: Axes, target: Target, limits: Tensor) -> None:
    if target.dim == 2:
        ends = limits.T.tolist()
        first, second = (torch.linspace(low, high, _GRID) for low, high in ends)
        points = torch.cartesian_prod(first, second)
        energy = target(points).view(_GRID, _GRID).T
        levels = float(energy.min()) + torch.tensor([0.0, 0.5, 1, 2, 3, 4.5, 6, 8])
        axes.contourf(first, second, energy, levels.tolist(), cmap="Blues_r")
    axes.set_xlim(*limits[:, 0].tolist())
    axes.set_ylim(*limits[:, 1].tolist())


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=90)
    plt.close(figure)
