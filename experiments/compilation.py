"""The chain of a training step as compiled code, where that saves time."""

from copy import copy
from typing import Any, cast

import torch._functorch.config as activations
from lightning.pytorch import Callback, LightningModule, Trainer

from data import ImageDataModule
from dglm import DGLM
from experiments.command import CommandError
from samplers import Kernel

WORTH_COMPILING = 2e6
"""Gradients of a learned chain from which on compiling pays: 10 µs are saved on each, of the 20 s
that compiling takes where nothing is cached. HMC's, to first order, save a third of that."""


def images_per_update(trainer: Trainer, data: ImageDataModule) -> int:
    """Return how many images one update takes, over all processes and accumulated batches."""
    return data.batch_size * trainer.world_size * trainer.accumulate_grad_batches


def training_gradients(trainer: Trainer, dglm: DGLM) -> float:
    """Return the gradients of U that the whole training takes; infinity where it has no end."""
    data = cast(ImageDataModule, trainer.datamodule)  # type: ignore[attr-defined]
    images = trainer.estimated_stepping_batches * images_per_update(trainer, data)
    return images * dglm.gradients_per_update


def is_compiled(wanted: bool | None, trainer: Trainer, dglm: DGLM) -> bool:
    """Return whether to compile: what is wanted, else by the configuration, never by a timing.

    A resumed training must decide as the uninterrupted one, whose rounding it repeats.
    """
    if dglm.kernel is None:
        return False
    if wanted is not None:
        return wanted
    learned = any(True for _ in dglm.kernel.parameters())
    least = WORTH_COMPILING if learned else 3 * WORTH_COMPILING
    return training_gradients(trainer, dglm) / trainer.world_size >= least


class CompileTraining(Callback):
    """Has the training step, and nothing else, run a compiled copy of the kernel.

    Validation, pictures and scores run chains of other shapes, each of which would be compiled
    anew. The copy shares the kernel's parameters and buffers.

    Arguments:
        wanted: Whether to compile; by default where it saves time.
        recompute: Whether the compiled code keeps next to nothing for the backward pass, and takes
            it anew there: a tenth of the memory, in up to a half more time.

    Raises:
        CommandError: Something is to be recomputed, but nothing is compiled.
    """

    def __init__(self, wanted: bool | None = None, recompute: bool = False) -> None:
        self.wanted = wanted
        self.recompute = recompute
        self._eager: Kernel | None = None
        self._compiled: Kernel | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the copy; it is compiled in the first update."""
        dglm = cast(DGLM, pl_module)
        if dglm.kernel is not None and is_compiled(self.wanted, trainer, dglm):
            self._eager, self._compiled = dglm.kernel, copy(dglm.kernel)
            self._compiled.compile()
            activations.activation_memory_budget = 0.0 if self.recompute else 1.0
        elif self.recompute:
            raise CommandError("--recompute true is for compiled chains: add --compile true")

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
