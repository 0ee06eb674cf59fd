"""Held-out log p(x) over the seconds of training: VAE, HMC-DGLM and L2HMC-DGLM.

Models of the main command's size, each trained anew for every length, its learning rate falling at
the end. Models that are finished are kept: --resume goes on, with more of them too.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
from rich.console import Console

from experiments.shared.cli import command_options, resumed_arguments, run_command
from experiments.shared.runs import print_files, read_json, write_json
from experiments.shared.trainings import (
    Trainings,
    across_seeds,
    check_splits,
    paired,
    run_in_folder,
    score_model,
    train_model,
)

Name = Literal["vae", "hmc-5x5", "hmc-2x12", "hmc-coordinates", "l2hmc-coordinates"]

LEVELS = (-95.0, -90.0, -87.0)
"""Nats, the seconds to which are told."""
REFERENCE: Name = "hmc-2x12"
"""HMC-DGLM in z with the length that suits it: what the others are compared with."""
_IN_Z = ["--model.coordinates", "false", "--model.step_size", "0.1"]
_IN_COORDINATES = ["--model.coordinates", "true", "--model.step_size", "0.4"]
_GROWING = ("models", "shares", "seeds")


class Recipe(NamedTuple):
    """How a model is trained."""

    label: str
    arguments: list[str]
    """Of experiments.mnist."""
    updates: int
    """Of share 1: in about the time of the reference's, more or less by the machine."""


def _chain(steps: int, leapfrogs: int) -> list[str]:
    return ["--model.num_mh_steps", str(steps), "--model.num_leapfrogs", str(leapfrogs)]


RECIPES: dict[Name, Recipe] = {
    "vae": Recipe("VAE", ["--kernel", "none", "--model.learning_rate", "0.002"], 18_000),
    "hmc-5x5": Recipe(
        "HMC-DGLM, 5 × 5",
        ["--kernel", "hmc", *_chain(5, 5), *_IN_Z],
        4_500,
    ),
    REFERENCE: Recipe("HMC-DGLM, 2 × 12", ["--kernel", "hmc", *_chain(2, 12), *_IN_Z], 5_000),
    "hmc-coordinates": Recipe(
        "HMC-DGLM in coordinates, 2 × 4",
        ["--kernel", "hmc", *_chain(2, 4), *_IN_COORDINATES],
        6_500,
    ),
    "l2hmc-coordinates": Recipe(
        "L2HMC-DGLM in coordinates, 2 × 4",
        ["--kernel", "l2hmc", *_chain(2, 4), *_IN_COORDINATES, "--compile", "true"],
        5_400,
    ),
}
"""By their names; numbers are Metropolis-Hastings steps × leapfrogs."""


class Model(NamedTuple):
    """A training."""

    recipe: Name
    share: float
    seed: int

    @property
    def updates(self) -> int:
        """Of the training."""
        return round(self.share * RECIPES[self.recipe].updates)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.recipe}-{self.updates}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Quality(Trainings):
    """What is trained, for how long, and how it is scored.

    Args:
        models: Which models.
        shares: Lengths of the trainings; 1 takes three to fifteen minutes of a core.
    """

    models: list[Name] = field(default_factory=lambda: list(RECIPES))
    shares: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5, 1.0])
    num_images: int = 200
    num_chains: int = 8
    num_temperatures: int = 50
    num_leapfrogs: int = 5

    def __post_init__(self) -> None:
        """Raise ValueError where a list is empty, or a training would have no update."""
        super().__post_init__()
        self.check_some("models")
        self.check_some("shares")
        for model in self.trainings():
            if not model.updates > 0:
                raise ValueError(f"share {model.share} of {model.recipe} is no update: take more")

    def trainings(self) -> list[Model]:
        """Return all trainings, the shortest first, so that models take turns."""
        return [
            Model(recipe, share, seed)
            for seed in dict.fromkeys(self.seeds)
            for share in sorted(set(self.shares))
            for recipe in dict.fromkeys(self.models)
        ]

    def training_arguments(self, model: Model, folder: Path) -> list[str]:
        """Return the command line of experiments.mnist that trains a model in a folder."""
        return [
            *self.common_arguments(model.seed, folder),
            *RECIPES[model.recipe].arguments,
            *("--trainer.max_steps", str(model.updates)),
        ]


def main(arguments: list[str] | None = None) -> None:
    """Train and score, as the arguments say; by default those of the command line."""
    given = resumed_arguments(sys.argv[1:] if arguments is None else arguments)
    options = command_options("quality", __doc__, Quality, given)
    if options.resume is None:
        check_splits(partial(options.training_arguments, options.trainings()[0]), ["test"])
    run_in_folder("quality", options, _GROWING, measure)


def measure(folder: Path, options: Quality) -> None:
    """Train and score what is not there yet, and write the results anew after each model."""
    console, models = Console(), options.trainings()
    for number, model in enumerate(models, 1):
        console.print(f"{number} of {len(models)}: {model.name}", highlight=False)
        own = folder / model.name
        train_model(options, options.training_arguments(model, own), own)
        score_model(options, own)
        found = results(options, folder)
        write_json(found, folder / "results.json")
        (folder / "table.md").write_text(markdown(found))
        draw(found, folder / "curve.png")
    console.print((folder / "table.md").read_text(), highlight=False, soft_wrap=True)
    print_files(folder)


def results(options: Quality, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each model and length: means over the seeds that are finished."""
    found = []
    for recipe in dict.fromkeys(options.models):
        for share in sorted(set(options.shares)):
            done = [
                Model(recipe, share, seed)
                for seed in dict.fromkeys(options.seeds)
                if (folder / Model(recipe, share, seed).name / "test.json").exists()
            ]
            if done:
                found.append(_row(folder, recipe, done))
    return found


def _row(folder: Path, recipe: Name, done: list[Model]) -> dict[str, Any]:
    scores = [read_json(folder / model.name / "test.json")["log_likelihood"] for model in done]
    trained = [read_json(folder / model.name / "training.json") for model in done]
    pairs = [
        paired(folder / model.name, folder / model._replace(recipe=REFERENCE).name)
        for model in done
    ]
    over = [pair for pair in pairs if pair is not None and recipe != REFERENCE]
    return {
        "model": recipe,
        "updates": done[0].updates,
        "seconds": mean(each["training_seconds"] for each in trained),
        "log_likelihood": mean(scores),
        "seeds": {str(model.seed): score for model, score in zip(done, scores, strict=True)},
        "over_reference": _difference(over) if over else None,
    }


def _difference(over: list[tuple[float, float]]) -> dict[str, float | None]:
    """Return the mean of paired differences; its error over seeds, of one seed over images."""
    found = across_seeds([difference for difference, _ in over])
    return found if len(over) > 1 else {**found, "standard_error": over[0][1]}


def seconds_to(level: float, rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the seconds of training to a level of log p(x), between lengths in their logarithm.

    None where it is not reached, or passed by the shortest training already.
    """
    for before, after in pairwise(rows):
        low, high = before["log_likelihood"], after["log_likelihood"]
        if low <= level <= high:
            share = (level - low) / (high - low) if high > low else 1.0
            first, last = math.log(before["seconds"]), math.log(after["seconds"])
            return math.exp(first + share * (last - first))
    return None


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the scores and the seconds to each level as tables."""
    lines = [
        f"| model | updates | seconds | log p(x), nats | seeds "
        f"| over {RECIPES[REFERENCE].label}, same share |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        over, seeds = row["over_reference"], ", ".join(f"{x:.2f}" for x in row["seeds"].values())
        error = "" if over is None else f"{over['difference']:+.2f} ± {over['standard_error']:.2f}"
        cells = RECIPES[row["model"]].label, f"{row['updates']:,}", f"{row['seconds']:.0f}"
        score = f"{row['log_likelihood']:.2f}"
        lines.append(f"| {' | '.join([*cells, score, seeds, error])} |")
    columns = " | ".join(f"seconds to {level:g}" for level in LEVELS)
    lines += ["", f"| model | {columns} |", "|---|" + "---|" * len(LEVELS)]
    for name, own in by_model(rows).items():
        times = [seconds_to(level, own) for level in LEVELS]
        told = ["" if time is None else f"{time:.0f}" for time in times]
        lines.append(f"| {' | '.join([RECIPES[name].label, *told])} |")
    return "\n".join(lines) + "\n"


def by_model(rows: list[dict[str, Any]]) -> dict[Name, list[dict[str, Any]]]:
    """Return the rows of each model, the shortest training first."""
    return {name: own for name in RECIPES if (own := [row for row in rows if row["model"] == name])}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw log p(x) over the seconds of training: means over seeds, each seed as a dot."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, own in by_model(rows).items():
        seconds = [row["seconds"] for row in own]
        (line,) = axis.plot(
            seconds, [row["log_likelihood"] for row in own], "-", label=RECIPES[name].label
        )
        for row in own:
            scores = list(row["seeds"].values())
            axis.plot([row["seconds"]] * len(scores), scores, ".", color=line.get_color())
    axis.set(xscale="log", xlabel="seconds of training", ylabel="held-out log p(x), nats")
    for formatted in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        formatted("{x:g}")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_command(main)
