"""Training of a learned sampler on any energy: Algorithm 1 of the L2HMC paper."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from samplers.energy import Energy, Tempered, fresh_leaf
from samplers.io import load_plain, save_whole
from samplers.kernel import Kernel, finite_start
from samplers.metric import Metric, check_spread, measured_jump
from samplers.moments import Moments
from samplers.objective import reciprocal_jump_loss
from samplers.random import seeded_generator

Initial = Callable[[int, torch.Generator], Tensor]
"""Draws n points from the distribution that chains start from, (n, D), with a generator on the
kernel's device."""

_START_STREAM, _ITERATION_STREAM = 0, 1
_DECAY_INTERVAL = 1000
_SAVE_INTERVAL = 500
_SLOWEST_MOMENTS = 0.01


@dataclass(frozen=True)
class TrainingSettings:
    """How a sampler is trained.

    Args:
        num_iterations: Updates of the sampler's parameters.
        num_chains: Persistent chains.
        jump_scale: λ, the length that counts as a good jump.
        initial_weight: λ_b, the weight of the loss at fresh draws of the initial distribution, as
            many as there are persistent chains; 0 for none.
        metric: What jumps are measured in: plain distance, which the widest axes dominate; running
            standard deviations; the running covariance; or "squares", the coordinates w that it
            whitens and their squares alike, so that leaping to the mirror image is no progress.
        initial_temperature: The energy is divided by a temperature that falls geometrically from
            here to 1 over the first ``annealing_iterations``.
        annealing_iterations: 0 for no annealing.
        learning_rate: Adam's.
        learning_rate_decay: Its factor over each 1,000 iterations.
        seed: All randomness is a function of (seed, iteration).

    Raises:
        ValueError: A number is out of range, or the metric is unknown.
    """

    num_iterations: int = 5000
    num_chains: int = 200
    jump_scale: float = 1.0
    initial_weight: float = 0.0
    metric: Metric = "plain"
    initial_temperature: float = 1.0
    annealing_iterations: int = 0
    learning_rate: float = 1e-3
    learning_rate_decay: float = 0.96
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: A number is out of range.
        """
        for name in ("num_iterations", "num_chains"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("jump_scale", "initial_temperature", "learning_rate", "learning_rate_decay"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("initial_weight", "annealing_iterations", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.metric not in get_args(Metric):
            allowed = ", ".join(map(repr, get_args(Metric)))
            raise ValueError(f"metric must be one of {allowed}, got {self.metric!r}")

    def temperature(self, iteration: int) -> float:
        """Return T at an iteration: T₀^(1 - i/n) for i < n, then 1."""
        if iteration >= self.annealing_iterations:
            return 1.0
        return self.initial_temperature ** (1 - iteration / self.annealing_iterations)


class TrainingHistory(NamedTuple):
    """Means over the chains at each iteration, (iterations,) each, on the CPU."""

    loss: Tensor
    """ℓ_λ of the persistent chains plus λ_b times that of the fresh ones."""
    acceptance: Tensor
    """Acceptance probability."""
    jump: Tensor
    """Expected squared jump δA, in the units of the metric."""
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
    checkpoint: Path | None = None,
    progress: Callable[[int], None] = lambda iterations: None,
) -> TrainingHistory:
    r"""Train a kernel on a target by Algorithm 1.

    Each iteration moves persistent chains by one step, started where the last one left them, and
    descends

    .. math:: E_p[ℓ_λ(δA)] + λ_b E_q[ℓ_λ(δA)]

    over them (p) and over chains that start at fresh draws of the initial distribution (q).

    Arguments:
        kernel: Its parameters are trained in place; compile it first for a long training.
        energy: U, from (B, D) to (B,).
        initial: Draws the points that chains start from.
        settings: How to train; by default the paper's way.
        checkpoint: A file to save into every 500 iterations and to go on from, where it exists;
            the resumed training repeats the uninterrupted one.
        progress: Called with the iterations done since the last call; an exception that it raises
            ends the training, which is saved first.

    Raises:
        ValueError: The checkpoint is of a training with other settings or of another target, the
            kernel has no parameters to train, the energy or its gradient is not finite where a
            chain starts, or the chains are too few or start too close together for the metric.

    References:
        Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
        Sohl-Dickstein, 2018), Algorithm 1.

    Example:
        >>> import torch
        >>> from samplers import L2HMC, TrainingSettings, train_sampler
        >>> kernel = L2HMC(dim=2, num_leapfrogs=5)
        >>> energy = lambda x: 0.5 * (x / torch.tensor([0.1, 1.0])).square().sum(dim=-1)
        >>> settings = TrainingSettings(num_iterations=3, num_chains=10)  # thousands, for use
        >>> def initial(count, generator):
        ...     return torch.randn(count, 2, generator=generator, device=generator.device)
        >>> history = train_sampler(kernel, energy, initial, settings)
        >>> history.loss.shape
        torch.Size([3])
    """
    training = _Training(kernel, energy, initial, settings or TrainingSettings())
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None and checkpoint.exists():
        training.load(checkpoint)
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
            if checkpoint is not None and due:
                training.save(checkpoint)
    return TrainingHistory(*torch.stack(training.history).T)


class _Training:
    """Algorithm 1 between two iterations."""

    def __init__(
        self, kernel: Kernel, energy: Energy, initial: Initial, settings: TrainingSettings
    ) -> None:
        self.kernel, self.initial, self.settings = kernel, initial, settings
        self.parameters = [each for each in kernel.parameters() if each.requires_grad]
        if not self.parameters:
            raise ValueError(f"{type(kernel).__name__} has no parameters to train: use adapt")
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.learning_rate)
        self.history: list[Tensor] = []
        self.device = self.parameters[0].device
        self.energy = Tempered(energy, self.parameters[0].new_ones(()))
        generator = seeded_generator(self.device, settings.seed, _START_STREAM)
        self.position = initial(settings.num_chains, generator).to(self.parameters[0])
        self.start_energy = finite_start(kernel, energy, self.position).energy
        check_spread(settings.metric, self.position)
        self.moments = Moments.of(self.position)

    def iterate(self) -> None:
        """Move the chains by one step and the parameters by one update."""
        began = time.perf_counter()
        iteration, settings = len(self.history), self.settings
        generator = seeded_generator(self.device, settings.seed, _ITERATION_STREAM, iteration)
        self.energy.temperature.fill_(settings.temperature(iteration))
        for group in self.optimizer.param_groups:
            decay = settings.learning_rate_decay ** (iteration / _DECAY_INTERVAL)
            group["lr"] = settings.learning_rate * decay
        start = self.position
        if settings.initial_weight > 0:
            fresh = self.initial(settings.num_chains, generator).to(start)
            start = torch.cat([start, fresh])
        state = fresh_leaf(self.kernel.init(start, self.energy))
        noise = self.kernel.noise(state, generator)
        [(after, info)] = self.kernel(state, self.energy, [noise])
        jump = measured_jump(settings.metric, self.moments, start, info.proposal)
        losses = reciprocal_jump_loss(jump, info.acceptance, settings.jump_scale)
        loss = losses[: settings.num_chains].mean()
        if settings.initial_weight > 0:
            loss = loss + settings.initial_weight * losses[settings.num_chains :].mean()
        skipped = self._update(loss)
        self.position = after.position[: settings.num_chains].detach()
        weight = max(1 / (iteration + 2), _SLOWEST_MOMENTS)
        self.moments = self.moments.mixed(Moments.of(self.position), weight)
        step_size = self.kernel.step_size
        record = loss, info.acceptance, jump * info.acceptance, info.diverging, step_size, skipped
        means = torch.stack([each.detach().float().mean() for each in record]).cpu()
        seconds = means.new_tensor([time.perf_counter() - began])
        self.history.append(torch.cat([means, seconds]))

    def _update(self, loss: Tensor) -> Tensor:
        """Take one step of Adam, but not where the gradient is not finite."""
        self.optimizer.zero_grad()
        loss.backward(inputs=self.parameters)  # and not those of the energy
        gradients = [each.grad for each in self.parameters if each.grad is not None]
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        if finite:
            self.optimizer.step()
        return ~finite

    def save(self, path: Path) -> None:
        """Write all that the rest of the training depends on."""
        content = {
            "settings": asdict(self.settings),
            "start_energy": self.start_energy,
            "kernel": self.kernel.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.position,
            "moments": tuple(self.moments),
            "history": torch.stack(self.history),
        }
        save_whole(content, path)

    def load(self, path: Path) -> None:
        """Go on from a file that :meth:`save` wrote."""
        content = load_plain(path)
        if content.get("settings") != asdict(self.settings):
            raise ValueError(
                f"{path} is of a training with other settings, {content.get('settings')}; remove "
                "it or train into another file"
            )
        if "start_energy" not in content:
            raise ValueError(
                f"{path} was written by an earlier version; remove it or train into another file"
            )
        start_energy = content["start_energy"].to(self.start_energy)
        if not torch.allclose(start_energy, self.start_energy, rtol=1e-4, atol=1e-4):
            raise ValueError(
                f"{path} is of a training of another target, where U differs at the start; remove "
                "it or train into another file"
            )
        self.kernel.load_state_dict(content["kernel"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.position = content["position"].to(self.device)
        self.moments = Moments(*(part.to(self.device) for part in content["moments"]))
        self.history = list(content["history"])
