"""Callbacks of a training: compilation, clock, progress bar, banner and pictures."""

import math
import time
from copy import copy
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from data import ImageDataModule, shard_indices
from dglm import DGLM
from experiments.shared.cli import progress_columns
from experiments.shared.models import model_name
from experiments.shared.pictures import image_grid
from experiments.shared.scoring import BATCH_SIZE, ScoringOptions, scoring_gradients
from samplers import Kernel, seeded_generator

WORTH_COMPILING = 4e6
"""Gradients of a learned chain whose training compiling shortens by 20 s, as it saves 10 µs on
each and takes 20 s itself where nothing is cached; HMC's save a third of that."""
_STATUS_EVERY = 10
_RECONSTRUCTED = 8
_SAMPLES_A_ROW = 8


def images_per_update(trainer: Trainer, data: ImageDataModule) -> int:
    """Return how many images one update takes, over all processes and accumulated batches."""
    return data.batch_size * trainer.world_size * trainer.accumulate_grad_batches


def training_gradients(trainer: Trainer, dglm: DGLM) -> float:
    """Return the gradients of U that the whole training takes; infinity where it has no end."""
    data = cast(ImageDataModule, trainer.datamodule)  # type: ignore[attr-defined]
    images = trainer.estimated_stepping_batches * images_per_update(trainer, data)
    return images * dglm.gradients_per_update


def logged_metrics(dglm: DGLM, with_validation: bool = True) -> list[str]:
    """Return the names of all metrics that a training logs."""
    train, validation = ["log_elbo"], ["log_elbo", "log_joint_q"]
    if dglm.kernel is not None:
        shared = ["log_joint", "acceptance", "divergence"]
        train += [*shared, "sampler_loss", "jump", "step_size"]
        validation += shared
    if dglm.coordinate_network is not None:
        train += ["coordinate_loss"]
    validation = validation if with_validation else []
    return [f"train/{name}" for name in train] + [f"validation/{name}" for name in validation]


class Clock(Callback):
    """Counts the seconds of a training up to its last update, over all its sittings."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on."""
        self._began = time.monotonic() - self.seconds

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Look at the clock."""
        self.seconds = time.monotonic() - self._began

    def state_dict(self) -> dict[str, float]:
        """Return the seconds, for checkpoints."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on from the seconds of a checkpoint."""
        self.seconds = state_dict["seconds"]


class CompileTraining(Callback):
    """Has the training step, and nothing else, run a compiled copy of the kernel.

    Validation, pictures and scores run chains of other shapes, each of which would be compiled
    anew. The copy shares the kernel's parameters and buffers.
    """

    _eager: Kernel | None = None
    _compiled: Kernel | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the copy; it is compiled in the first update."""
        dglm = cast(DGLM, pl_module)
        if dglm.kernel is not None:
            self._eager, self._compiled = dglm.kernel, copy(dglm.kernel)
            self._compiled.compile()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *batch: Any
    ) -> None:
        """Put the copy in the kernel's place."""
        self._put(self._compiled, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Put the kernel back."""
        self._put(self._eager, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put the kernel back."""
        self._put(self._eager, pl_module)

    def _put(self, kernel: Kernel | None, pl_module: LightningModule) -> None:
        if kernel is not None:
            cast(DGLM, pl_module).kernel = kernel


class TrainingProgress(Callback):
    """One bar over all updates of a training, however many epochs they take.

    Lightning's own bar starts anew each epoch, so that it cannot tell when training ends.
    """

    progress: Progress | None = None
    """Made where training starts: it cannot be sent to another process."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar, from the step where training starts."""
        if trainer.is_global_zero:
            self.progress = progress_columns()
            self.progress.start()
            total = trainer.estimated_stepping_batches
            self.task = self.progress.add_task(
                "training",
                total=total if math.isfinite(total) else None,
                completed=trainer.global_step,
                status="",
            )

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Advance the bar by one update."""
        if self.progress is None:
            return
        status = ""
        if trainer.global_step % _STATUS_EVERY == 0:
            metrics = trainer.progress_bar_metrics
            named = {name.split("/")[-1]: value for name, value in metrics.items()}
            status = " ".join(f"{name} {value:.3g}" for name, value in named.items())
            self.progress.update(self.task, status=status)
        self.progress.update(self.task, completed=trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the bar off the terminal."""
        if self.progress is not None:
            self.progress.stop()

    def on_exception(self, *arguments: Any) -> None:
        """Take the bar off the terminal after an error, which skips the teardown."""
        if self.progress is not None:
            self.progress.stop()


class Banner(Callback):
    """Prints what is trained, on what, where, and what it costs.

    Arguments:
        compile: Whether the chain is compiled.
        scoring: How the trained model will be scored.
        num_images: On how many images.
        folder: The run folder.
    """

    def __init__(
        self, compile: bool, scoring: ScoringOptions, num_images: int, folder: Path
    ) -> None:
        self.compile = compile
        self.scoring = scoring
        self.num_images = num_images
        self.folder = folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it, in the first process."""
        if not trainer.is_global_zero:
            return
        dglm = cast(DGLM, pl_module)
        data = cast(ImageDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        table = Table(box=None, show_header=False, title=f"{model_name(dglm)}, seed {dglm.seed}")
        table.title_justify = "left"
        for label, text in self.rows(dglm, data, trainer).items():
            table.add_row(label, text)
        Console().print(table, highlight=False)

    def rows(self, dglm: DGLM, data: ImageDataModule, trainer: Trainer) -> dict[str, str]:
        """Return the lines of the banner, by what they tell of."""
        return {
            "model": model_size(dglm),
            "data": data_size(data),
            "device": device(trainer),
            "update": update_cost(dglm, images_per_update(trainer, data)),
            "training": training_cost(dglm, trainer),
            "compiled": compilation(self.compile, dglm, trainer),
            "scoring": self._scoring_cost(dglm),
            "files": str(self.folder),
        }

    def _scoring_cost(self, dglm: DGLM) -> str:
        sizes, rows = self.scoring, shard_indices(self.num_images, BATCH_SIZE)
        gradients = sum(scoring_gradients(rows, sizes, dglm))
        return (
            f"{self.num_images:,} test images, {sizes.num_chains} chains, "
            f"{sizes.num_temperatures:,} temperatures: {gradients:.2g} gradients"
        )


def model_size(dglm: DGLM) -> str:
    """Return the sizes of the parts of a model, in words."""
    parts = {
        "decoder": dglm.model,
        "encoder": dglm.encoder,
        "kernel": dglm.sampler,
        "coordinates": dglm.coordinate_network,
    }
    sizes = [f"{name} {num_weights(part):,}" for name, part in parts.items() if part is not None]
    return (
        f"{dglm.model.latent_dim} latent variables, {type(dglm.model.likelihood).__name__} pixels; "
        f"weights: {', '.join(sizes)}"
    )


def num_weights(module: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(parameter.numel() for parameter in module.parameters())


def data_size(data: ImageDataModule) -> str:
    """Return the data set and the sizes of its splits, in words."""
    shape = " x ".join(map(str, data.image_shape))
    kind = "binarized" if data.binarize else "grey levels"
    return f"{data.dataset_name}: {data.counts}, {shape}, {kind}"


def device(trainer: Trainer) -> str:
    """Return what computes, in words."""
    root = trainer.strategy.root_device
    if root.type == "cuda":
        name = torch.cuda.get_device_name(root)
    else:
        name = f"{root.type}, {torch.get_num_threads()} thread(s)"
    return f"{name}, {trainer.world_size} process(es), precision {trainer.precision}"


def update_cost(dglm: DGLM, images: int) -> str:
    """Return what one update, of so many images, takes, in words."""
    if dglm.sampler is None:
        return f"{images:,} images, no gradients of U"
    learned = any(True for _ in dglm.sampler.parameters())
    order = "second order" if learned else "first order"
    if learned and dglm.coordinate_network is not None:
        order = "first order, but for siblings"
    return (
        f"{images:,} images, {dglm.num_mh_steps} MH steps of {dglm.sampler.num_leapfrogs} "
        f"leapfrogs: {dglm.gradients_per_update:g} gradients of U each, "
        f"{images * dglm.gradients_per_update:,.0f} in all, to {order}"
    )


def training_cost(dglm: DGLM, trainer: Trainer) -> str:
    """Return what the whole training takes, in words."""
    updates = trainer.estimated_stepping_batches
    resumed = f", going on after {trainer.global_step:,}" if trainer.global_step else ""
    if math.isinf(updates):
        return f"until its time is up or it is stopped{resumed}"
    epochs = updates * trainer.accumulate_grad_batches / trainer.num_training_batches
    gradients = training_gradients(trainer, dglm)
    return f"{updates:,.0f} updates{resumed}, {epochs:.1f} epochs, {gradients:.2g} gradients"


def compilation(wanted: bool, dglm: DGLM, trainer: Trainer) -> str:
    """Return whether the chain is compiled, in words, and whether that would pay."""
    if dglm.sampler is None:
        return "nothing"
    if wanted:
        return "the chain of an update, in the first one: up to a minute"
    learned = any(True for _ in dglm.sampler.parameters())
    least = WORTH_COMPILING if learned else 3 * WORTH_COMPILING
    if training_gradients(trainer, dglm) / trainer.world_size < least:
        return "nothing"
    return "nothing; --compile true makes a training of this length faster"


class ImagesOverTime(Callback):
    """Logs reconstructions and samples before training and after each validation.

    ``reconstructions`` has a column for each of eight validation images (training images where
    there are none): the image, the mean of p(x|z) at a draw of q(z|x), and at the end of the
    chain that starts there. ``samples`` are means of p(x|z) for z from the prior. The noise is the
    same each time, so that what changes is the model.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the images, and log what there is before the first update."""
        data = cast(ImageDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        validation = data.heldout("validation")
        images = validation if len(validation) else data.heldout("train")
        self._images = images[:_RECONSTRUCTED].to(next(pl_module.parameters()))
        self._shape = data.image_shape
        self._log(trainer, cast(DGLM, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what there is after so many updates."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._log(trainer, cast(DGLM, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what there is in the end, unless the last validation has."""
        if trainer.global_step > self._logged:
            self._log(trainer, cast(DGLM, pl_module))

    def _log(self, trainer: Trainer, dglm: DGLM) -> None:
        self._logged = trainer.global_step
        loggers = [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)]
        if not trainer.is_global_zero or not loggers:
            return
        rows = torch.cat(reconstructions(dglm, self._images))
        grids = {
            "reconstructions": image_grid(rows, self._shape, len(self._images)),
            "samples": image_grid(samples(dglm), self._shape, _SAMPLES_A_ROW),
        }
        for name, grid in grids.items():
            for logger in loggers:
                logger.experiment.add_image(name, grid, trainer.global_step)


@torch.no_grad()
def reconstructions(dglm: DGLM, images: Tensor) -> list[Tensor]:
    """Return images (N, D), their reconstructions by q and, if there is one, by the kernel."""

    def rebuilt(num_mh_steps: int | None) -> Tensor:
        generator = seeded_generator(images.device, dglm.seed, "training.reconstructions")
        return dglm.reconstruct(images, num_mh_steps, generator)

    return [images, rebuilt(0)] + ([] if dglm.kernel is None else [rebuilt(None)])


@torch.no_grad()
def samples(dglm: DGLM) -> Tensor:
    """Return means of p(x|z) for z from the prior, (64, D)."""
    generator = seeded_generator(dglm.device, dglm.seed, "training.samples")
    z = dglm.model.sample(_SAMPLES_A_ROW**2, generator)[1]
    return dglm.model.likelihood.mean(dglm.model.decoder(z))
