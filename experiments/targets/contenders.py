"""The samplers that are compared, each trained or tuned as far as its kind goes."""

import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.shared.cli import counted, stopped_between
from samplers import (
    HMC,
    L2HMC,
    Independence,
    Kernel,
    Learned,
    Preconditioned,
    Target,
    TrainingSettings,
    adapt,
    learn,
    seeded_generator,
    train_sampler,
)
from samplers.adaptation import Mass, settle
from samplers.comparison import LENGTHS, tune_hmc
from samplers.energy import Counted

_START_SCALES = {"icg": 3.0, "scg": 3.0, "mog": 2.0, "rough_well": 2.0, "banana": 5.0}
_LEARNING_CHAINS = 100
_WARM_UP_STEPS = 400

_PAPERS: dict[str, dict[str, Any]] = {
    "icg": {"hidden": 100},
    "mog": {"initial_weight": 1.0, "initial_temperature": 10.0},
    "rough_well": {"hidden": 20, "step_size": 0.2, "initial_weight": 0.1, "learning_rate": 3e-4},
}
"""Where the settings of the paper's way differ by target: chosen for its ESS of x a step."""


class Contender(NamedTuple):
    """A sampler that is ready, and what that has cost."""

    kernel: Kernel | None
    settings: str
    gradients: int
    """Over all chains."""
    seconds: float
    message: str = ""


class Setting:
    """A target, a seed, and what is shared by the samplers that are compared on it."""

    def __init__(
        self,
        name: str,
        target: nn.Module,
        seed: int,
        num_steps: int,
        num_iterations: int,
        budget: int,
        folder: Path,
        quiet: bool,
    ) -> None:
        self.name, self.target, self.seed, self.num_steps = name, target, seed, num_steps
        self.num_iterations, self.budget = num_iterations, budget
        self.folder, self.quiet = folder, quiet
        self.dim: int = target.dim  # type: ignore[assignment]

    def generator(self, stream: str) -> torch.Generator:
        """Return a stream of this seed."""
        return seeded_generator("cpu", self.seed, f"targets.{stream}")

    def broad(self, count: int, generator: torch.Generator) -> Tensor:
        """Return starts that a user could have: spread, and in both modes of the unequal mixture.

        It is known of the mixture where its modes are; from one alone nothing finds the other.
        """
        if self.name == "mog_unequal" and isinstance(self.target, Target):
            return self.target.sample(count, generator)
        scale = _START_SCALES.get(self.name, getattr(self.target, "start_scale", 1.0))
        return scale * torch.randn(count, self.dim, generator=generator)

    def start(self, count: int) -> Tensor:
        """Return exact draws, or where there are none the end of a warm-up of HMC."""
        generator = self.generator("start")
        if isinstance(self.target, Target):
            return self.target.sample(count, generator)
        position = settle(self.target, self.broad(count, generator), generator=generator)
        steps = 2 * _WARM_UP_STEPS
        return adapt(
            HMC(10), self.target, position, steps, mass="dense", generator=generator
        ).position

    @cached_property
    def broad_start(self) -> Tensor:
        """The starts of learning and of warm-ups."""
        return self.broad(_LEARNING_CHAINS, self.generator("broad"))


def contenders(setting: Setting) -> dict[str, Callable[[], Contender]]:
    """Return what builds each sampler, by its name in the table."""
    return {
        "learned": partial(learned, setting),
        "L2HMC, trained": partial(trained, setting),
        "the paper's way": partial(papers_way, setting),
        "jumps, the paper's setting": partial(jumps, setting),
        "HMC, tuned": partial(hmc, setting, "unit"),
        "HMC, dense mass, tuned": partial(hmc, setting, "dense"),
        "independence": partial(independence, setting),
    }


def learned(setting: Setting) -> Contender:
    """Learn in one call, with defaults."""
    found = _learn(setting)
    found.save(setting.folder / "learned.pt")
    return Contender(found.kernel, found.chosen, found.gradients, found.seconds, found.message)


def trained(setting: Setting) -> Contender:
    """Take the best of the trained kernels of the same learning, whatever was chosen there."""
    found = _learn(setting)
    names = [name for name in found.kernels if name.startswith("learned")]
    best = max(names, key=lambda name: found.table.row(name)["ess_per_gradient"])
    return Contender(found.kernels[best], best, found.gradients, found.seconds)


def _learn(setting: Setting) -> Learned:
    return learn(
        setting.target,
        setting.broad_start,
        budget=setting.budget,
        seed=setting.seed,
        checkpoint=setting.folder / "learn",
        progress=not setting.quiet,
    )


def papers_way(setting: Setting) -> Contender:
    """Train ten leapfrogs in raw coordinates by the reciprocal loss, at λ = 0.3."""
    own = {"hidden": 10, "step_size": 0.1, **_PAPERS.get(setting.name, {})}
    kernel = _l2hmc(setting, own.pop("hidden"), own.pop("step_size"))
    annealed = "initial_temperature" in own
    iterations = setting.num_iterations * (4 if annealed else 1)
    settings = TrainingSettings(
        iterations,
        200,
        "reciprocal",
        **{
            "jump_scale": 0.3,
            "curvature_length": 0.0,
            "learning_rate": 1e-3,
            "final_learning_rate": 0.82,  # 0.96 each 1,000 of 5,000 iterations
            "annealing_iterations": 3 * iterations // 4 if annealed else 0,
            "seed": setting.seed,
            **own,
        },
    )
    return _trained(setting, "paper", kernel, settings)


def jumps(setting: Setting) -> Contender:
    """Train the same kernel for jumps in their own running moment."""
    kernel = _l2hmc(setting, 100 if setting.dim > 2 else 50, 0.1)
    settings = TrainingSettings(
        setting.num_iterations // 2,
        200,
        "jumps",
        curvature_length=0.0,
        learning_rate=3e-3,
        final_learning_rate=0.05,
        seed=setting.seed,
    )
    return _trained(setting, "jumps", kernel, settings)


def _l2hmc(setting: Setting, hidden: int, step_size: float) -> L2HMC:
    torch.manual_seed(setting.seed)
    return L2HMC(setting.dim, 10, step_size, hidden)


def _trained(setting: Setting, name: str, kernel: L2HMC, settings: TrainingSettings) -> Contender:
    with (
        counted(f"{setting.name}, {name}", settings.num_iterations, setting.quiet) as shown,
        stopped_between(shown) as progress,
    ):
        history = train_sampler(
            kernel,
            setting.target,
            setting.broad,
            settings,
            checkpoint=setting.folder / f"training-{name}.pt",
            progress=progress,
        )
    kernel.requires_grad_(False)
    chains = settings.num_chains * (2 if settings.initial_weight > 0 else 1)
    gradients = settings.num_iterations * (kernel.num_leapfrogs + 1) * chains
    return Contender(kernel, settings_of(kernel), gradients, float(history.seconds.sum()))


def hmc(setting: Setting, mass: Mass) -> Contender:
    """Warm HMC up and choose length and step size by the very measure that is reported."""
    began, energy = time.perf_counter(), Counted(setting.target)
    warm, position = _warmed_up(setting, energy, mass)
    lengths = LENGTHS if mass == "dense" else (*LENGTHS, 50, 100)
    tuned = tune_hmc(
        warm,
        energy,
        position,
        max(20, setting.num_steps // 10),
        setting.generator("tuning"),
        lengths,
    )
    seconds = time.perf_counter() - began
    return Contender(tuned, settings_of(tuned), energy.count, seconds)


def independence(setting: Setting) -> Contender:
    """Propose from N(μ, Σ) of the warm-up that HMC with a dense mass has."""
    began, energy = time.perf_counter(), Counted(setting.target)
    warm, _ = _warmed_up(setting, energy, "dense")
    kernel = warm.with_kernel(Independence())
    return Contender(kernel, "N(μ, Σ)", energy.count, time.perf_counter() - began)


def _warmed_up(setting: Setting, energy: Counted, mass: Mass) -> tuple[Preconditioned, Tensor]:
    generator = setting.generator("warm-up")
    position = settle(energy, setting.broad_start, generator=generator)
    warm = adapt(HMC(5), energy, position, _WARM_UP_STEPS, mass=mass, generator=generator)
    kernel = warm.kernel
    if not isinstance(kernel, Preconditioned):
        kernel = Preconditioned(kernel, torch.zeros(setting.dim), torch.ones(setting.dim))
    return kernel, warm.position


def settings_of(kernel: Kernel) -> str:
    """Return a kernel's step size and leapfrogs in words."""
    leapfrogs = f"{kernel.num_leapfrogs} leapfrog{'s' if kernel.num_leapfrogs > 1 else ''}"
    return f"ε {float(kernel.step_size.detach()):.3g}, {leapfrogs}"
