"""Held-out images, and log-likelihoods on them over as many devices as the Trainer has."""

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data import (
    MNIST_SHAPE,
    Batches,
    DataError,
    ImageDataModule,
    Split,
    check_heldout,
    shard_indices,
)
from dglm import DGLM, AISResult, AISSettings
from dglm.ais import gradient_evaluations
from dglm.importance import mean_and_error
from dglm.starts import StartName, named_start
from experiments.shared.cli import counted
from experiments.shared.runs import partial_file
from samplers.io import Resumable

BATCH_SIZE = 128
"""Images that a trained model is scored on at once."""


@dataclass(frozen=True)
class ScoringOptions(AISSettings):
    """How log p(x) is estimated.

    Args:
        start: Where the chains start: at the prior, at the encoder's q(z|x), from where fewer
            temperatures are needed, at the kernel's coordinates of each image, from where few are,
            or at fits to the posteriors, which find modes that networks miss and cost the most.
    """

    start: StartName = "fitted"

    def __post_init__(self) -> None:
        """Raise ValueError where a number is out of range, or the start is unknown."""
        super().__post_init__()
        if self.start not in get_args(StartName):
            allowed = ", ".join(get_args(StartName))
            raise ValueError(f"start must be one of {allowed}, got {self.start!r}")

    @property
    def settings(self) -> AISSettings:
        """What an estimate takes beside its start."""
        return AISSettings(**{each.name: getattr(self, each.name) for each in fields(AISSettings)})


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the images come from.

    Args:
        name: The data set, or the path of images of your own; by default what the model was
            trained on.
        root: The folder of the data sets.
    """

    name: str | None = None
    root: str = "datasets"


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """A trained model of which a command draws a picture.

    Args:
        checkpoint: Checkpoint of a DGLM, for example runs/mnist-001/checkpoints/last.ckpt.
        seed: Seed of all randomness.
        output: The picture, a .png file, beside the checkpoint's run by default; the figures go
            into a .json of the same name.
        quiet: Show no progress bars.
        accelerator: cpu, gpu or auto.
        data: Where the images come from.
    """

    checkpoint: str
    seed: int = 0
    output: str | None = None
    quiet: bool = False
    accelerator: str = "auto"
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        """Check the seed.

        Raises:
            ValueError: It is negative.
        """
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


def held_out(
    options: DataOptions, trained: dict[str, Any], split: Split = "test"
) -> ImageDataModule:
    """Return the data to judge on, which the model must not have been trained on.

    Arguments:
        options: Where the images come from.
        trained: What the model was trained on, as its checkpoint says.
        split: Which images will be used; those of "train" need not be held out.

    Raises:
        DataError: The model was trained on these very images, or they have changed since, or there
            are none.
    """
    own = trained["dataset_name"]
    name = options.name or own

    def read(validation: int | None) -> ImageDataModule:
        binarize = trained.get("binarize", True)
        data = ImageDataModule(name, options.root, validation=validation, binarize=binarize)
        data.setup()
        return data

    data = read(trained["validation"] if name == own else None)
    if data.dataset_name == own != name:  # under another path, or in the place of mnist
        return held_out(replace(options, name=own), trained, split)
    shape = tuple(trained.get("image_shape", MNIST_SHAPE))
    if data.image_shape != shape:
        raise DataError(
            f"the images of {data.dataset_name} are of shape {data.image_shape}, those that the "
            f"model was trained on of {shape}"
        )
    if name != own and "digest" in trained and data.state_dict().get("digest") == trained["digest"]:
        data = read(trained["validation"])  # a file that was moved: split as it was
    elif data.dataset_name == own and data.state_dict() != trained:
        raise DataError(
            f"the images of {data.dataset_name} are others than those that the model was trained "
            "on, so that none are known to be held out; restore them, or name another data set"
        )
    if split != "train":
        check_heldout(own, data.dataset_name)
    check_split(data, split)
    return data


def check_split(data: ImageDataModule, split: Split) -> None:
    """Raise DataError where a split has no images."""
    if not len(data.labels(split)):
        raise DataError(
            f"there are no {split} images of {data.dataset_name}: the model is trained on all of "
            "them, as by --data.validation 0; choose another split"
        )


def score(
    trainer: Trainer,
    dglm: DGLM,
    images: Tensor,
    options: ScoringOptions,
    batch_size: int,
    quiet: bool,
) -> AISResult:
    """Estimate log p(x) of each image (N, D) by ``trainer.test``; in every process the same.

    Batches that ``dglm.test_results`` holds are not estimated again.
    """
    rows = shard_indices(len(images), batch_size, trainer.global_rank, trainer.world_size)
    batches = Batches(images.to(trainer.strategy.root_device), rows)
    costs = scoring_gradients(rows, options, dglm)
    done = sum(costs[index] for index in dglm.test_results)
    dglm.ais, dglm.ais_start = options.settings, options.start
    hidden = quiet or not trainer.is_global_zero
    with counted("log-likelihood, gradients", sum(costs), hidden) as progress:
        progress(done)
        dglm.test_progress = progress
        trainer.test(dglm, batches, verbose=False)
    return dglm.test_result


def scoring_gradients(batches: Sequence[Sized], options: ScoringOptions, dglm: DGLM) -> list[int]:
    """Return the gradients that the score of each batch takes, its pilot's included."""
    start = named_start(options.start, dglm)
    return [gradient_evaluations(dglm.model, len(batch), options, start) for batch in batches]


class KeepResults(Callback):
    """Keeps the results of finished batches in a file, so that nothing is computed twice.

    Arguments:
        output: The file that the finished evaluation will write; this one lies beside it.
        rank: Which process this is.
        identity: What tells this evaluation from another.

    Raises:
        ResumeError: What an interrupted evaluation has left is damaged or of another one.
    """

    def __init__(self, output: Path, rank: int, identity: dict[str, Any]) -> None:
        self._file = Resumable(partial_file(output, f"{rank}.pt"), identity)
        self._points: dict[str, Any] = self._file.load() or {}

    def results(self, settings: AISSettings) -> dict[int, AISResult]:
        """Return what is there already for one point of a curve, by batch."""
        found = self._points.get(_point(settings), {})
        return {index: AISResult(*parts) for index, parts in found.items()}

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Write all results so far."""
        dglm = cast(DGLM, pl_module)
        plain = {index: tuple(result) for index, result in dglm.test_results.items()}
        self._points[_point(dglm.ais)] = plain
        self._file.save(self._points)


def _point(settings: AISSettings) -> str:
    return f"{settings.num_temperatures} temperatures"


def score_summary(result: AISResult, options: ScoringOptions) -> dict[str, Any]:
    """Return the figures of a score over a set of images as flat keys."""
    log_likelihood, standard_error = mean_and_error(result.log_likelihood)
    count = len(result.log_likelihood)
    return {
        "log_likelihood": log_likelihood,
        "standard_error": standard_error,
        "standard_error_chains": float(result.standard_error.square().sum().sqrt()) / count,
        "num_images": count,
        **{
            each.name: getattr(options, each.name)
            for each in fields(ScoringOptions)
            if each.name != "seed"
        },
        "acceptance": float(result.acceptance.mean()),
        "effective_sample_size": float(result.effective_sample_size.mean()),
        "unreliable_images": int(result.unreliable.sum()),
        "missed_modes": int(result.missed_modes.sum()),
        "gradient_evaluations": result.gradient_evaluations,
    }


def check_error_bars(num_images: int, num_chains: int) -> None:
    """Raise ValueError where there are too few images or chains for a standard error."""
    for name, count in (("num_images", num_images), ("num_chains", num_chains)):
        if count < 2:
            raise ValueError(f"{name} must be at least 2 for an error bar, got {count}")
