"""What a training will do and cost, on one screen, before it starts."""

import math
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn

from data import ImageDataModule
from dglm import DGLM, AISSettings
from dglm.ais import gradient_evaluations
from experiments.compilation import images_per_update, is_compiled, training_gradients
from experiments.models import model_name


class Banner(Callback):
    """Prints what is trained, on what, where, and what it costs.

    Arguments:
        compile: Whether the chain is compiled; by default where it saves time.
        scoring: How the trained model will be scored.
        num_images: On how many images.
        folder: The run folder.
    """

    def __init__(
        self, compile: bool | None, scoring: AISSettings, num_images: int, folder: Path
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
            "scoring": self._scoring_cost(),
            "files": str(self.folder),
        }

    def _scoring_cost(self) -> str:
        sizes = self.scoring
        gradients = gradient_evaluations(
            self.num_images,
            sizes.num_chains,
            sizes.num_temperatures,
            sizes.num_leapfrogs,
            sizes.start,
        )
        return (
            f"{self.num_images:,} test images, {sizes.num_chains} chains, "
            f"{sizes.num_temperatures:,} temperatures: {gradients:.2g} gradients"
        )


def model_size(dglm: DGLM) -> str:
    """Return the sizes of the parts of a model, in words."""
    parts = {"decoder": dglm.model, "encoder": dglm.encoder, "kernel": dglm.kernel}
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
    counts = [f"{len(data.labels(split)):,} {split}" for split in ("train", "validation", "test")]
    shape = " x ".join(map(str, data.image_shape))
    kind = "binarized" if data.binarize else "grey levels"
    return f"{data.dataset_name}: {', '.join(counts)} images, {shape}, {kind}"


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
    if dglm.kernel is None:
        return f"{images:,} images, no gradients of U"
    order = "second" if any(True for _ in dglm.kernel.parameters()) else "first"
    return (
        f"{images:,} images, {dglm.num_mh_steps} MH steps of {dglm.kernel.num_leapfrogs} "
        f"leapfrogs: {dglm.gradients_per_update} gradients of U each, "
        f"{images * dglm.gradients_per_update:,} in all, to {order} order"
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


def compilation(wanted: bool | None, dglm: DGLM, trainer: Trainer) -> str:
    """Return whether the chain is compiled, in words."""
    if is_compiled(wanted, trainer, dglm):
        return "the chain of an update, in the first one: up to a minute"
    return "nothing" if wanted is False or dglm.kernel is None else "nothing: too short to pay"
