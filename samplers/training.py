"""Training of a learned sampler on any energy."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from samplers.adaptation import Mass, Moments, mass_factor
from samplers.energy import Energy, Smoothed, State, Tempered, fresh_leaf, twice
from samplers.io import Resumable
from samplers.kernel import Info, Kernel, finite_start
from samplers.objective import Objective, RunningMeans, jumps, reciprocal, siblings
from samplers.preconditioned import Preconditioned, Transformed
from samplers.random import seeded_generator
from samplers.turns import Turns

Initial = Callable[[int, torch.Generator], Tensor]
"""Draws n points from the distribution that chains start from, (n, D), with a generator on the
kernel's device."""

ObjectiveName = Literal["siblings", "jumps", "reciprocal"]

_REWHITENINGS = (0.2, 0.4, 0.6, 0.8, 0.9)
_SAVE_INTERVAL = 500


@dataclass(frozen=True)
class TrainingSettings:
    """How a sampler is trained.

    Args:
        num_iterations: Updates of the sampler's parameters.
        num_chains: Persistent chains.
        objective: A function of :mod:`samplers.objective`: "siblings", which asks for independent
            draws; "jumps", for many leapfrogs in raw coordinates; "reciprocal", the paper's.
        jump_scale: λ of the reciprocal objective, the length that counts as a good jump.
        initial_weight: λ_b, the weight of the reciprocal objective at fresh draws of the initial
            distribution, as many as there are persistent chains; 0 for none.
        rewhiten: At 20, 40, 60, 80 and 90 % of the training, have the coordinates of a
            :class:`samplers.Preconditioned` kernel follow the chains, where the temperature is 1.
        curvature_length: h, over which second derivatives of the energy are differences, in the
            kernel's coordinates (:class:`samplers.energy.Smoothed`); 0 for exact ones.
        initial_temperature: The energy is divided by a temperature that falls geometrically from
            here to 1 over the first ``annealing_iterations``.
        annealing_iterations: 0 for no annealing.
        learning_rate: Adam's, which falls as a cosine.
        final_learning_rate: Its share at the end.
        seed: All randomness is a function of (seed, iteration).

    Raises:
        ValueError: A number is out of range, or the objective is unknown.
    """

    num_iterations: int = 3000
    num_chains: int = 100
    objective: ObjectiveName = "siblings"
    jump_scale: float = 1.0
    initial_weight: float = 0.0
    rewhiten: bool = True
    curvature_length: float = 0.2
    initial_temperature: float = 1.0
    annealing_iterations: int = 0
    learning_rate: float = 0.01
    final_learning_rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: A number is out of range.
        """
        for name in ("num_iterations", "num_chains"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("jump_scale", "initial_temperature", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        not_negative = (
            "initial_weight",
            "annealing_iterations",
            "curvature_length",
            "final_learning_rate",
            "seed",
        )
        for name in not_negative:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.objective not in get_args(ObjectiveName):
            allowed = ", ".join(map(repr, get_args(ObjectiveName)))
            raise ValueError(f"objective must be one of {allowed}, got {self.objective!r}")
        for name, unused in (("initial_weight", 0.0), ("jump_scale", 1.0)):
            if getattr(self, name) != unused and self.objective != "reciprocal":
                raise ValueError(
                    f"{name} is of the objective 'reciprocal', not {self.objective!r}: leave it at "
                    f"{unused}, got {getattr(self, name)}"
                )
        if (self.initial_temperature != 1) != (self.annealing_iterations > 0):
            raise ValueError(
                "annealing takes both an initial_temperature and annealing_iterations, got "
                f"{self.initial_temperature} and {self.annealing_iterations}"
            )
        if self.annealing_iterations >= self.num_iterations:
            raise ValueError(
                "annealing_iterations must be fewer than num_iterations, or the training never "
                f"sees the target itself: got {self.annealing_iterations} of {self.num_iterations}"
            )

    def temperature(self, iteration: int) -> float:
        """Return T at an iteration: T₀^(1 - i/n) for i < n, then 1."""
        if iteration >= self.annealing_iterations:
            return 1.0
        return self.initial_temperature ** (1 - iteration / self.annealing_iterations)

    def learning_rate_at(self, iteration: int) -> float:
        r"""Return :math:`r \left(s + (1 - s) \tfrac{1}{2} (1 + \cos π i/n)\right)`."""
        cosine = 0.5 * (1 + math.cos(math.pi * iteration / self.num_iterations))
        share = self.final_learning_rate + (1 - self.final_learning_rate) * cosine
        return self.learning_rate * share

    def rewhitens_after(self, iteration: int) -> bool:
        """Say whether the coordinates follow the chains after an iteration, counted from 0."""
        return iteration + 1 in {round(share * self.num_iterations) for share in _REWHITENINGS}


class TrainingHistory(NamedTuple):
    """Means over the chains at each iteration, (iterations,) each, on the CPU."""

    loss: Tensor
    """What the training descends."""
    score: Tensor
    """The objective's own measure of progress, see :mod:`samplers.objective`."""
    acceptance: Tensor
    """Acceptance probability."""
    diverging: Tensor
    """Share of the steps that failed."""
    step_size: Tensor
    """ε."""
    skipped: Tensor
    """1 where the gradient was not finite, so that the parameters were left alone."""
    seconds: Tensor
    """Duration on the clock."""


def train_sampler(
    kernel: Kernel,
    energy: Energy,
    initial: Initial,
    settings: TrainingSettings | None = None,
    *,
    checkpoint: Path | str | None = None,
    progress: Callable[[int], None] = lambda iterations: None,
) -> TrainingHistory:
    r"""Train a kernel on a target: Algorithm 1 of the paper, with any objective.

    Each iteration moves persistent chains by one step, started where the last one left them, and
    descends the objective by Adam. A kernel in other coordinates is trained in them.

    Arguments:
        kernel: Its parameters are trained in place; compile it first for a long training.
        energy: U, from (B, D) to (B,).
        initial: Draws the points that chains start from.
        settings: How to train.
        checkpoint: A file to save into every 500 iterations and to go on from, where it exists;
            the resumed training repeats the uninterrupted one.
        progress: Called with the iterations done since the last call; an exception that it raises
            ends the training, which is saved first.

    Raises:
        ValueError: The checkpoint is of a training with other settings or of another target, the
            kernel has no parameters to train, or they are frozen, the energy or its gradient is not
            finite where a chain starts, or chains start at one point where their spread is the
            unit.
        TypeError: The kernel has :class:`samplers.Turns`.

    References:
        Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
        Sohl-Dickstein, 2018), Algorithm 1.

    Example:
        >>> import torch
        >>> from samplers import L2HMC, TrainingSettings, train_sampler
        >>> kernel = L2HMC(dim=2, num_leapfrogs=1, step_size=1.0)
        >>> energy = lambda x: 0.5 * x.square().sum(dim=-1)
        >>> settings = TrainingSettings(num_iterations=3, num_chains=10)  # hundreds, for use
        >>> def initial(count, generator):
        ...     return torch.randn(count, 2, generator=generator, device=generator.device)
        >>> history = train_sampler(kernel, energy, initial, settings)
        >>> history.loss.shape
        torch.Size([3])
    """
    training = _Training(kernel, energy, initial, settings or TrainingSettings())
    kept = Resumable(checkpoint, training.identity)
    if (content := kept.load()) is not None:
        training.resume(content)
    progress(len(training.history))
    while len(training.history) < training.settings.num_iterations:
        training.iterate()
        count = len(training.history)
        due = count == training.settings.num_iterations or count % _SAVE_INTERVAL == 0
        try:
            progress(1)
        except BaseException:
            due = True
            raise
        finally:
            if due:
                kept.save(training.state())
    return TrainingHistory(*torch.stack(training.history).T)


class _Training:
    """A training between two iterations; positions are in the kernel's own coordinates."""

    def __init__(
        self, kernel: Kernel, energy: Energy, initial: Initial, settings: TrainingSettings
    ) -> None:
        if not callable(initial):
            raise TypeError(
                "initial is a function of a count and a generator that draws as many starts, got "
                f"{type(initial).__name__}"
            )
        self.kernel, self.initial, self.settings = kernel, initial, settings
        self.parameters = [each for each in kernel.parameters() if each.requires_grad]
        if any(isinstance(each, Turns) for each in kernel.modules()):
            raise TypeError("train each kernel before they take turns: they have no one proposal")
        if not self.parameters:
            how = "use adapt"
            if any(True for _ in kernel.parameters()):
                how = "they are frozen, kernel.requires_grad_(True) frees them"
            raise ValueError(f"{type(kernel).__name__} has no parameters to train: {how}")
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.learning_rate)
        self.history: list[Tensor] = []
        self.device = self.parameters[0].device
        generator = seeded_generator(self.device, settings.seed, "training.start")
        start = initial(settings.num_chains, generator).to(self.parameters[0])
        if len(start) != settings.num_chains:
            raise ValueError(f"asked for {settings.num_chains} starts, initial drew {len(start)}")
        self.start_energy = finite_start(kernel, energy, start).energy
        if settings.objective == "siblings" and (start == start[0]).all(dim=0).any():
            raise ValueError(
                "siblings measures in the spread of the chains: have them start apart in every "
                "coordinate"
            )
        self.inner, self.coordinates = kernel, None
        if isinstance(kernel, Transformed):
            self.inner, self.coordinates = kernel.kernel, kernel.coordinates(energy)
        self.position = self._into(start)
        self.tempered = Tempered(self.coordinates or energy, self.parameters[0].new_ones(()))
        smooth = settings.curvature_length > 0
        self.energy = (
            Smoothed(self.tempered, settings.curvature_length) if smooth else self.tempered
        )
        self.running = RunningMeans()
        self.moments: tuple[int, Moments] | None = None

    def iterate(self) -> None:
        """Move the chains by one step and the parameters by one update."""
        began = time.perf_counter()
        iteration, settings = len(self.history), self.settings
        generator = seeded_generator(self.device, settings.seed, "training.step", iteration)
        self.tempered.temperature.fill_(settings.temperature(iteration))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(iteration)
        after, info, objective = self._step(generator)
        skipped = self._update(objective.loss)
        self.position = after.position[: settings.num_chains].detach()
        self._rewhiten(iteration, after.position.detach())
        step_size = self.inner.step_size
        record = *objective, info.acceptance, info.diverging, step_size, skipped
        means = torch.stack([each.detach().float().mean() for each in record]).cpu()
        seconds = means.new_tensor([time.perf_counter() - began])
        self.history.append(torch.cat([means, seconds]))

    def _step(self, generator: torch.Generator) -> tuple[State, Info, Objective]:
        """Propose from every chain, twice for siblings; the first proposals continue the chains."""
        settings, start, count = self.settings, self.position, self.settings.num_chains
        if settings.initial_weight > 0:
            fresh = self.initial(count, generator).to(start)
            start = torch.cat([start, self._into(fresh)])
        state = self.inner.init(start, self.energy)
        if settings.objective == "siblings":
            state = twice(state)
        state = fresh_leaf(state)
        after, info = self.inner.step(state, self.energy, self.inner.noise(state, generator))
        first, second = _rows(info, slice(count)), _rows(info, slice(count, None))
        if settings.objective == "siblings":
            return after, info, siblings(start, first, second, self.running)
        if settings.objective == "jumps":
            return after, info, jumps(start, info, self.running)
        objective = reciprocal(start[:count], first, settings.jump_scale)
        if settings.initial_weight > 0:
            other = reciprocal(start[count:], second, settings.jump_scale)
            loss = objective.loss + settings.initial_weight * other.loss
            objective = objective._replace(loss=loss)
        return after, info, objective

    def _update(self, loss: Tensor) -> Tensor:
        """Take one step of Adam, but not where the gradient is not finite."""
        self.optimizer.zero_grad()
        loss.backward(inputs=self.parameters)  # and not those of the energy
        gradients = [each.grad for each in self.parameters if each.grad is not None]
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        if finite:
            self.optimizer.step()
        return ~finite

    def _into(self, x: Tensor) -> Tensor:
        return x if self.coordinates is None else self.coordinates.into(x)

    @torch.no_grad()
    def _rewhiten(self, iteration: int, draws: Tensor) -> None:
        """Pool the moments of all draws of temperature 1; make them the coordinates in time."""
        kernel, settings = self.kernel, self.settings
        at_work = settings.rewhiten and settings.temperature(iteration) == 1.0
        if not (at_work and isinstance(kernel, Preconditioned) and self.coordinates is not None):
            return
        count, moments = self.moments or (0, None)
        batch = Moments.of(self.coordinates.out_of(draws))
        moments = batch if moments is None else moments.mixed(batch, 1 / (count + 1))
        self.moments = count + 1, moments
        if not settings.rewhitens_after(iteration):
            return
        x = self.coordinates.out_of(self.position)
        mass: Mass = "diagonal" if kernel.factor.dim() == 1 else "dense"
        kernel.factor.copy_(mass_factor(moments, (count + 1) * len(draws), mass))
        kernel.location.copy_(moments.mean)
        self.position = self.coordinates.into(x)
        self.running.restart()

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this training from another."""
        shapes = {name: list(part.shape) for name, part in self.kernel.state_dict().items()}
        return {
            "settings": asdict(self.settings),
            "kernel": {"class": type(self.kernel).__name__, **shapes},
            "target, by U at the start": self.start_energy,
        }

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the training depends on."""
        return {
            "kernel": self.kernel.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.position,
            "running": self.running.state_dict(),
            "moments": self.moments and (self.moments[0], tuple(self.moments[1])),
            "history": torch.stack(self.history),
        }

    def resume(self, content: dict[str, Any]) -> None:
        """Go on from a state."""
        self.kernel.load_state_dict(content["kernel"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.position = content["position"].to(self.device)
        self.running.load_state_dict(content["running"], self.device)
        if content["moments"] is not None:
            count, parts = content["moments"]
            self.moments = count, Moments(*(part.to(self.device) for part in parts))
        self.history = list(content["history"])


def _rows(info: Info, rows: slice) -> Info:
    return Info(*(field[rows] for field in info))
