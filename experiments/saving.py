"""Checkpoints of a run: when they are written, and how, so that nothing can be lost."""

import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from dglm import TrainingFailed
from experiments.command import STOP_SIGNALS, Stopped, stop
from samplers.io import write_beside

_SAVE_SECONDS = 300.0
_AGREE_EVERY = 10


class LastTwo(TorchCheckpointIO):
    """Keeps last.ckpt and, as previous.ckpt, the one before; at any moment one of them is whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a temporary file, then rename it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = write_beside(checkpoint, path)
        if path.exists():
            path.replace(previous_checkpoint(path))
        temporary.replace(path)


def last_checkpoint(run: Path) -> Path:
    """Return the newest whole checkpoint of a run folder; it may not exist."""
    last = run / "checkpoints" / "last.ckpt"
    previous = previous_checkpoint(last)
    return previous if previous.exists() and not last.exists() else last


def previous_checkpoint(last: Path) -> Path:
    """Return where the checkpoint before the last one is kept."""
    return last.with_name("previous.ckpt")


class SaveCheckpoints(Checkpoint):
    """Saves every five minutes, after each validation and at the end of training.

    Also where training fails, and at SIGINT or SIGTERM: then training ends with the update that
    has begun; a second signal ends it at once.

    Arguments:
        run: The run folder.

    Raises:
        Stopped: A signal has arrived, and the checkpoint is written.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / "checkpoints" / "last.ckpt"
        self._signal = 0
        self._saved_at = 0.0
        self._saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which gives all back in the end."""
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._last_step = trainer.estimated_stepping_batches
        for number in STOP_SIGNALS:
            signal.signal(number, self._notice)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time to, and after the last update."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # a checkpoint holds no half-accumulated gradient
        number, due = self._requests(trainer)
        if number or due or trainer.global_step == self._last_step:
            self._save(trainer)
        if number:
            raise Stopped(number)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after each validation of training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after an end that was not known before, as by --trainer.max_time."""
        self._save(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save where training failed in all processes alike."""
        if isinstance(exception, TrainingFailed):
            self._save(trainer)

    def _requests(self, trainer: Trainer) -> tuple[int, bool]:
        """Return which signal has arrived, and whether it is time to save: in any process."""
        late = time.monotonic() - self._saved_at > _SAVE_SECONDS
        if trainer.world_size == 1:
            return self._signal, late
        if trainer.global_step % _AGREE_EVERY:
            return 0, False
        own = torch.tensor([self._signal, late], device=trainer.strategy.root_device)
        number, due = trainer.strategy.reduce(own, reduce_op="max").tolist()
        return number, bool(due)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step > self._saved_step:
            trainer.save_checkpoint(self.path)
            self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def _notice(self, number: int, frame: object) -> None:
        self._signal = number
        signal.signal(number, stop)
