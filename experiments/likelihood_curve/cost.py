"""What a likelihood curve would cost, found by timing a few updates of each model."""

import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data import shard_indices
from dglm import DGLM
from dglm.ais import gradient_evaluations, quiet_estimate
from dglm.starts import named_start
from experiments.evaluate import Evaluate
from experiments.likelihood_curve.models import LikelihoodCurve, Model
from experiments.mnist import command_line, train
from experiments.shared.callbacks import images_per_update
from experiments.shared.scoring import scoring_gradients

_UNTIMED_UPDATES, _TIMED_UPDATES = 2, 5
_TIMED_IMAGES, _TIMED_TEMPERATURES = 8, 3


class Cost(NamedTuple):
    """Of one model's training."""

    updates: int
    gradients: int
    """Of U, for one image each."""
    seconds: float
    scoring_gradients: int
    """Of one score."""
    seconds_a_scoring_gradient: float


class UpdateTimer(Callback):
    """Measures updates, but not the first ones."""

    def __init__(self) -> None:
        self._ends: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Look at the clock after an update, which may take several batches."""
        self._ends.setdefault(trainer.global_step, time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of one update."""
        last = _UNTIMED_UPDATES + _TIMED_UPDATES
        return (self._ends[last] - self._ends[_UNTIMED_UPDATES]) / _TIMED_UPDATES


def training_cost(options: LikelihoodCurve, model: Model) -> Cost:
    """Train a model for a few updates in a temporary folder and extrapolate."""
    timer = UpdateTimer()
    with tempfile.TemporaryDirectory() as folder:
        arguments = options.training_arguments(model, Path(folder) / model.name)
        steps = str(_UNTIMED_UPDATES + _TIMED_UPDATES)
        few = ["--trainer.max_steps", steps, "--trainer.max_epochs", "-1", "--quiet", "true"]
        cli = command_line([*arguments, *few])
        dglm, data, trainer = cli.model, cli.datamodule, cli.trainer
        trainer.callbacks.append(timer)  # type: ignore[attr-defined]
        train(cli)
        batches = len(data.train_dataloader())
        updates = options.num_epochs * math.ceil(batches / trainer.accumulate_grad_batches)
        images = updates * images_per_update(trainer, data)
        gradients = round(images * dglm.gradients_per_update)
        device = trainer.strategy.root_device
        scoring = scoring_seconds(options, dglm.to(device), data.heldout("test").to(device))
        rows = shard_indices(options.num_images, Evaluate.batch_size)
        scored = sum(scoring_gradients(rows, options, dglm))
    torch.compiler.reset()
    return Cost(updates, gradients, updates * timer.seconds, scored, scoring)


def scoring_seconds(options: LikelihoodCurve, dglm: DGLM, images: Tensor) -> float:
    """Return the seconds of one gradient of a score: few images and temperatures, not compiled."""
    images = images[: min(options.num_images, _TIMED_IMAGES)]
    settings = replace(options.settings, num_temperatures=_TIMED_TEMPERATURES, compile=False)
    began = time.perf_counter()
    start = named_start(options.start, dglm)
    quiet_estimate(dglm.model, images, settings, start, lambda gradients: None)
    gradients = gradient_evaluations(dglm.model, len(images), settings, start)
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
    gradients = scores * cost.scoring_gradients
    hours = f"{gradients * median(scoring) / 3600:.2f}"
    table.add_row(f"all trainings, {seeds} seed(s)", "", "", f"{total / 3600:.2f}")
    table.add_row(f"{scores} scores", "", f"{gradients:.2g}", hours)
    Console().print(table)
