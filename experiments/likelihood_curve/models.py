"""The models of the curve: options, training, scoring."""

import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import yaml

from dglm.ais import check_counts
from experiments.evaluate import Evaluate, TrainerOptions, evaluate
from experiments.mnist import command_line, train
from experiments.shared.checkpoints import last_checkpoint
from experiments.shared.models import KernelName
from experiments.shared.runs import write_json
from experiments.shared.scoring import DataOptions, ScoringOptions, check_error_bars, check_split

Split = Literal["train", "validation", "test"]


class Model(NamedTuple):
    """A model of the curve."""

    kernel: KernelName
    num_mh_steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder; a VAE takes no steps."""
        steps = "" if self.kernel == "none" else f"-{self.num_mh_steps}"
        return f"{self.kernel}{steps}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class CurveData:
    """Where the images come from; by default as the training's configuration says.

    Args:
        name: The data set, or the path of images of your own.
        root: The folder of the data sets.
    """

    name: str | None = None
    root: str | None = None


@dataclass(frozen=True, kw_only=True)
class LikelihoodCurve(ScoringOptions):
    """What is trained and how it is scored.

    Args:
        num_mh_steps: Metropolis-Hastings steps of an update: a model of each kernel for each.
        seeds: Of the weights, the order of the data and the noise; shared by all kernels.
        num_epochs: Passes over the training images.
        training: Configuration of experiments.mnist, a file or the name of a shipped one; by
            default that command's defaults. Always on one device.
        splits: Which images are scored. Choose with validation, score the test set once.
        num_images: How many images of each split, the first ones.
        seed: Seed of the scores.
        data: Where the images come from.
        dry_run: Print what it would cost, by timing a few updates of each model, and stop.
        output: Folder of the models and results; runs/likelihood_curve-NNN if null.
        resume: Such a folder to go on with.
        quiet: Show no progress bars.
    """

    num_mh_steps: list[int] = field(default_factory=lambda: [1, 2, 5, 7])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    num_epochs: int = 15
    training: str | None = None
    splits: list[Split] = field(default_factory=lambda: ["train", "test"])
    num_images: int = 500
    data: CurveData = field(default_factory=CurveData)
    dry_run: bool = False
    output: str | None = None
    resume: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError where a number is out of range, or a list is empty."""
        super().__post_init__()
        check_error_bars(self.num_images, self.num_chains)
        check_counts(num_epochs=self.num_epochs)
        if self.start == "coordinates":
            raise ValueError("start coordinates is not for a VAE, which has none: choose fitted")
        for name in ("num_mh_steps", "seeds", "splits"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        if min(self.num_mh_steps) < 1:
            raise ValueError(f"num_mh_steps must be at least 1, got {min(self.num_mh_steps)}")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be 0 or more, got {min(self.seeds)}")

    def models(self) -> list[Model]:
        """Return the models, seed by seed, the cheapest first."""
        steps = sorted(set(self.num_mh_steps))
        return [
            model
            for seed in dict.fromkeys(self.seeds)
            for model in [
                Model("none", 1, seed),
                *(Model("hmc", count, seed) for count in steps),
                *(Model("l2hmc", count, seed) for count in steps),
            ]
        ]

    def data_arguments(self) -> list[str]:
        """Return what of the data is chosen, as arguments of experiments.mnist."""
        return [
            text
            for name, value in asdict(self.data).items()
            if value is not None
            for text in (f"--data.{name}", value)
        ]

    def training_arguments(self, model: Model, folder: Path) -> list[str]:
        """Return the command line of experiments.mnist that trains a model in a folder."""
        configuration = [] if self.training is None else ["--config", self.training]
        return [
            *configuration,
            *self.data_arguments(),
            *("--kernel", model.kernel),
            *("--model.num_mh_steps", str(model.num_mh_steps)),
            *("--seed", str(model.seed)),
            *("--trainer.max_epochs", str(self.num_epochs)),
            *("--trainer.max_steps", "-1"),
            *("--trainer.limit_val_batches", "0"),
            *("--evaluation.start", "prior"),  # not used, and of any model
            *("--trainer.devices", "1"),
            *("--trainer.num_nodes", "1"),
            *("--quiet", str(self.quiet).lower()),
            *("--output", str(folder)),
        ]


def check_splits(options: LikelihoodCurve) -> None:
    """Raise DataError, before anything is trained, where a split to score has no images."""
    with tempfile.TemporaryDirectory() as folder:
        model = options.models()[0]
        data = command_line(options.training_arguments(model, Path(folder) / "model")).datamodule
    data.setup()
    for split in options.splits:
        check_split(data, split)


def train_model(options: LikelihoodCurve, model: Model, folder: Path) -> None:
    """Train a model, or go on with it; one that is trained already is left alone."""
    if (folder / "training.json").exists():
        return
    if last_checkpoint(folder).exists():
        arguments = ["--resume", str(folder), *options.data_arguments()]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it saved any
        arguments = options.training_arguments(model, folder)
    cli = command_line(arguments)
    dglm, _, updates, images = train(cli)
    figures = {
        "training_images": len(cli.datamodule.labels("train")),
        "epochs": options.num_epochs,
        "updates": updates,
        "training_seconds": cli.clock.seconds,
        "gradients_per_update": dglm.gradients_per_update,
        "training_gradient_evaluations": round(updates * images * dglm.gradients_per_update),
    }
    write_json(figures, folder / "training.json")
    torch.compiler.reset()  # the next model may be of other sizes


def score_model(options: LikelihoodCurve, folder: Path, split: Split) -> None:
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
