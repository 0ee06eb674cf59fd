"""What a likelihood curve would cost, found by timing a few updates of each model."""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dglm import DGLM, estimate_log_likelihood
from dglm.ais import gradient_evaluations
from experiments.likelihood_curve.options import LikelihoodCurve, Model
from experiments.mnist import command_line, train

_UNTIMED_UPDATES, _TIMED_UPDATES = 2, 5
_TIMED_IMAGES, _TIMED_TEMPERATURES = 8, 3


class Cost(NamedTuple):
    """Of one model's training."""

    updates: int
    gradients: int
    """Of U, for one image each."""
    seconds: float
    seconds_a_scoring_gradient: float


class UpdateTimer(Callback):
    """Measures updates, but not the first ones."""

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Start the clock, or stop it."""
        if trainer.global_step == _UNTIMED_UPDATES:
            self._began = time.perf_counter()
        self.seconds = (time.perf_counter() - self._began) / _TIMED_UPDATES

    def on_train_start(self, trainer: Trainer, *arguments: Any) -> None:
        """Start the clock for the untimed updates."""
        self._began = time.perf_counter()


def training_cost(options: LikelihoodCurve, model: Model) -> Cost:
    """Train a model for a few updates in a temporary folder and extrapolate."""
    timer = UpdateTimer()
    with tempfile.TemporaryDirectory() as folder:
        arguments = options.training_arguments(model, Path(folder) / model.name)
        steps = _UNTIMED_UPDATES + _TIMED_UPDATES
        cli = command_line([*arguments, "--trainer.max_steps", str(steps), "--quiet", "true"])
        cli.trainer.callbacks.append(timer)  # type: ignore[attr-defined]
        train(cli)
        updates = options.num_epochs * len(cli.datamodule.train_dataloader())
        gradients = updates * cli.model.gradients_per_update * cli.datamodule.batch_size
        scoring = scoring_seconds(options, cli.model, cli.datamodule.heldout("test"))
    torch.compiler.reset()
    return Cost(updates, gradients, updates * timer.seconds, scoring)


def scoring_seconds(options: LikelihoodCurve, dglm: DGLM, images: Tensor) -> float:
    """Return the seconds of one gradient of a score: few images and temperatures, not compiled."""
    images = images[: min(options.num_images, _TIMED_IMAGES)]
    sizes = options.num_chains, _TIMED_TEMPERATURES, options.num_leapfrogs
    began = time.perf_counter()
    estimate_log_likelihood(dglm.model, images, *sizes, start=dglm.ais_start(options))
    gradients = gradient_evaluations(len(images), *sizes, options.start)
    return (time.perf_counter() - began) / gradients


def print_costs(options: LikelihoodCurve) -> None:
    """Print the cost of each model's training and of the scores."""
    table = Table(title="Cost, from a few updates of each model; compiled chains take less")
    for column in ("model", "updates", "gradients", "hours"):
        table.add_column(column, justify="left" if column == "model" else "right")
    seeds, total = len(set(options.seeds)), 0.0
    scoring = []
    for model in options.models():
        if model.seed != options.seeds[0]:
            continue
        cost = training_cost(options, model)
        total += seeds * cost.seconds
        scoring.append(cost.seconds_a_scoring_gradient)
        name = model.name.partition("-seed")[0]
        hours = f"{cost.seconds / 3600:.2f}"
        table.add_row(f"{name}, each seed", f"{cost.updates:,}", f"{cost.gradients:.2g}", hours)
    scores = len(options.models()) * len(options.splits)
    gradients = scores * gradient_evaluations(
        options.num_images,
        options.num_chains,
        options.num_temperatures,
        options.num_leapfrogs,
        options.start,
    )
    hours = f"{gradients * median(scoring) / 3600:.2f}"
    table.add_row(f"all trainings, {seeds} seed(s)", "", "", f"{total / 3600:.2f}")
    table.add_row(f"{scores} scores", "", f"{gradients:.2g}", hours)
    Console().print(table)
