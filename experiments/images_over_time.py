"""Pictures of a model while it is trained, for TensorBoard."""

from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from data import ImageDataModule
from dglm import DGLM
from experiments.figures import image_grid
from samplers import seeded_generator

_STREAM = 0x74656E736F72
_RECONSTRUCTED = 8
_SAMPLES_A_ROW = 8


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
        generator = seeded_generator(images.device, _STREAM, dglm.seed, 0)
        return dglm.reconstruct(images, num_mh_steps, generator)

    return [images, rebuilt(0)] + ([] if dglm.kernel is None else [rebuilt(None)])


@torch.no_grad()
def samples(dglm: DGLM) -> Tensor:
    """Return means of p(x|z) for z from the prior, (64, D)."""
    generator = seeded_generator(dglm.device, _STREAM, dglm.seed, 1)
    z = dglm.model.sample(_SAMPLES_A_ROW**2, generator)[1]
    return dglm.model.likelihood.mean(dglm.model.decoder(z))
