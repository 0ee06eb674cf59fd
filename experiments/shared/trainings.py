"""Models that a command trains and scores into a folder, each once: it can be gone on with."""

import csv
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, TypeVar

import torch
import yaml

from dglm.importance import mean_and_error
from experiments.evaluate import Evaluate, TrainerOptions, evaluate
from experiments.mnist import command_line, train
from experiments.shared.checkpoints import last_checkpoint
from experiments.shared.cli import Stopped
from experiments.shared.runs import check_same_options, create_run, held, keep_config, write_json
from experiments.shared.scoring import DataOptions, ScoringOptions, check_error_bars, check_split

Split = Literal["train", "validation", "test"]
Options = TypeVar("Options", bound="Trainings")


@dataclass(frozen=True, kw_only=True)
class ImagesOptions:
    """Where the images come from; by default as the training's configuration says.

    Args:
        name: The data set, or the path of images of your own.
        root: The folder of the data sets.
    """

    name: str | None = None
    root: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trainings(ScoringOptions):
    """What all such commands are told.

    Args:
        training: Configuration of experiments.mnist, a file or the name of a shipped one; by
            default that command's defaults. Always on one device.
        seeds: Of the weights, the order of the data and the noise; shared by all models.
        num_images: How many images of a split are scored, the first ones.
        seed: Seed of the scores.
        data: Where the images come from.
        output: Folder of the models and results; runs/COMMAND-NNN if null.
        resume: Such a folder to go on with.
        quiet: Show no progress bars.
    """

    training: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    num_images: int = 500
    data: ImagesOptions = field(default_factory=ImagesOptions)
    output: str | None = None
    resume: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError where a number is out of range, or there is no seed."""
        super().__post_init__()
        check_error_bars(self.num_images, self.num_chains)
        if self.start == "coordinates":
            raise ValueError("start coordinates is not for a VAE, which has none: choose fitted")
        self.check_some("seeds")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be 0 or more, got {min(self.seeds)}")

    def check_some(self, name: str) -> None:
        """Raise ValueError where a list is empty."""
        if not getattr(self, name):
            raise ValueError(f"{name} must name at least one")

    def data_arguments(self) -> list[str]:
        """Return what of the data is chosen, as arguments of experiments.mnist."""
        return [
            text
            for name, value in asdict(self.data).items()
            if value is not None
            for text in (f"--data.{name}", value)
        ]

    def common_arguments(self, seed: int, folder: Path) -> list[str]:
        """Return the arguments of experiments.mnist that are the same for all models of a seed."""
        configuration = [] if self.training is None else ["--config", self.training]
        return [
            *configuration,
            *self.data_arguments(),
            *("--seed", str(seed)),
            *("--trainer.limit_val_batches", "0"),
            *("--evaluation.start", "prior"),  # not used, and of any model
            *("--trainer.devices", "1"),
            *("--trainer.num_nodes", "1"),
            *("--quiet", str(self.quiet).lower()),
            *("--output", str(folder)),
        ]


def check_splits(arguments: Callable[[Path], list[str]], splits: Sequence[Split]) -> None:
    """Raise DataError, before anything is trained, where a split to score has no images.

    Arguments:
        arguments: Those of experiments.mnist for a model in a folder.
        splits: That will be scored.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = command_line(arguments(Path(folder) / "model")).datamodule
    data.setup()
    for split in splits:
        check_split(data, split)


def run_in_folder(
    command: str,
    options: Options,
    growing: Sequence[str],
    work: Callable[[Path, Options], None],
) -> None:
    """Do a command's work in a new folder, or in one that it goes on in.

    Arguments:
        command: Its name.
        options: What it is told.
        growing: Names of lists that may have become longer in a folder that is there.
        work: Trains and scores what is not there yet.

    Raises:
        CommandError: Models or scores would be other ones than those that are there.
        Stopped: By a signal; what is done is kept.
    """
    if options.resume is None:
        folder = create_run(options.output, command)
    else:
        folder = Path(options.resume)
        options = gone_on_with(folder, options, growing)
    try:
        with held(folder):
            saved = {**asdict(options), "output": None, "resume": None}
            keep_config(folder, yaml.safe_dump(saved, sort_keys=False))
            work(folder, options)
    except Stopped as stopped:
        stopped.hint = f"go on with python -m experiments.{command} --resume {folder}"
        raise


def gone_on_with(folder: Path, options: Options, growing: Sequence[str]) -> Options:
    """Return the options with what the run in a folder has already.

    Raises:
        CommandError: Models or scores would be other ones than those that are there.
    """
    begun = yaml.safe_load((folder / "config.yaml").read_text())
    free = (*growing, "data", "dry_run", "output", "resume", "quiet")
    check_same_options(folder, begun, asdict(options), free)
    name = begun["data"]["name"]
    check_same_options(folder, {"data.name": name}, {"data.name": options.data.name}, ())
    grown: dict[str, Any] = {
        each: list(dict.fromkeys([*begun[each], *getattr(options, each)])) for each in growing
    }
    return replace(options, **grown)


def train_model(options: Trainings, arguments: list[str], folder: Path) -> None:
    """Train a model, or go on with it; one that is trained already is left alone.

    Arguments:
        options: Of the command.
        arguments: Of experiments.mnist, with the folder as its --output.
        folder: Of the model.
    """
    if (folder / "training.json").exists():
        return
    if last_checkpoint(folder).exists():
        arguments = ["--resume", str(folder), *options.data_arguments()]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it saved any
    cli = command_line(arguments)
    dglm, _, updates, images = train(cli)
    figures = {
        "training_images": len(cli.datamodule.labels("train")),
        "updates": updates,
        "training_seconds": cli.clock.seconds,
        "gradients_per_update": dglm.gradients_per_update,
        "training_gradient_evaluations": round(updates * images * dglm.gradients_per_update),
    }
    write_json(figures, folder / "training.json")
    torch.compiler.reset()  # the next model may be of other sizes


def score_model(options: Trainings, folder: Path, split: Split = "test") -> None:
    """Score a trained model on the data of its training; a score that is there already stays."""
    output = folder / f"{split}.json"
    if output.exists():
        return
    trained = yaml.safe_load((folder / "config.yaml").read_text())
    evaluate(
        Evaluate(
            checkpoint=str(last_checkpoint(folder)),
            split=split,
            num_images=options.num_images,
            data=DataOptions(root=options.data.root or trained["data"]["root"]),
            trainer=TrainerOptions(devices=1),
            output=str(output),
            quiet=options.quiet,
            start=options.start,
            **asdict(options.settings),
        )
    )


def paired(better: Path, worse: Path, split: Split = "test") -> tuple[float, float] | None:
    """Return the mean difference of two models' scores over the same images and its error.

    Arguments:
        better: The folder of the model whose scores the other's are subtracted from.
        worse: The folder of the other.
        split: Which images.

    Returns:
        Nats; None where one is not scored.
    """
    scores = []
    for folder in (better, worse):
        path = folder / f"{split}.csv"
        if not path.exists():
            return None
        with path.open(newline="") as file:
            scores.append([float(row["log_likelihood"]) for row in csv.DictReader(file)])
    pairs = [a - b for a, b in zip(*scores, strict=True)]
    return mean_and_error(torch.tensor(pairs, dtype=torch.float64))


def across_seeds(values: list[float]) -> dict[str, float | None]:
    """Return the mean over seeds and its standard error, unknown for a single seed."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"difference": mean(values), "standard_error": error}
