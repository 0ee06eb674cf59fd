"""Checkpoints of a run: written so that nothing can be lost, read so that nothing is executed."""

import pickle
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from dglm import DGLM
from dglm.callbacks import TrainingFailed
from experiments.shared.cli import STOP_SIGNALS, CommandError, Stopped, stop
from samplers.io import differences, write_beside

_SAVE_SECONDS = 300.0
_AGREE_EVERY = 10
_PARTS = ("hyper_parameters", "state_dict", "ImageDataModule")


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
        self.began = False
        """Whether training has begun, after all that could be refused."""
        self._signal = 0
        self._saved_at = 0.0
        self._saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which gives all back in the end."""
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._last_step = trainer.estimated_stepping_batches
        for number in STOP_SIGNALS:
            signal.signal(number, self._notice)
        self.began = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time to, and after the last update."""
        if trainer.fit_loop._should_accumulate():
            return  # a checkpoint holds no half-accumulated gradient
        number, due = self._requests(trainer)
        if number or due or trainer.global_step == self._last_step:
            self._save(trainer)
        if number:
            raise Stopped(number)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after each validation of training, but in the middle of an update."""
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if training and not trainer.fit_loop._should_accumulate():
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


def load_checkpoint(path: str) -> tuple[DGLM, dict[str, Any]]:
    """Return a trained model, ready to use, and what it was trained on.

    Raises:
        CommandError: The file is missing, damaged or not a DGLM's checkpoint.
    """
    trained = read_checkpoint(path)["ImageDataModule"]
    try:
        dglm = DGLM.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise _not_a_checkpoint(path, error) from error
    return dglm.eval(), trained


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint, after a look at its checksums and its weights.

    Nothing in it is executed, whatever it holds.

    Raises:
        CommandError: The file is missing, damaged or not a DGLM's checkpoint.
    """
    if not Path(path).is_file():
        raise CommandError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        parts = {name: content[name] for name in _PARTS}
        broken = [name for name, value in parts["state_dict"].items() if not _finite(value)]
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        AttributeError,
        EOFError,
        KeyError,
        TypeError,
        RuntimeError,
    ) as error:
        raise _not_a_checkpoint(path, error) from error
    if broken:
        raise CommandError(f"{path} holds weights that are not finite: {', '.join(broken)}")
    return content


def check_same_model(folder: Path, trained: dict[str, Any], present: dict[str, Any]) -> None:
    """Raise CommandError where a run would go on with other hyper-parameters than its own."""
    for name, before, now in differences(trained, present):
        raise CommandError(
            f"{folder} was trained with another model ({name} was {before}, is now {now}); resume "
            "it with the options of its config.yaml"
        )


def _finite(value: torch.Tensor) -> bool:
    return bool(value.isfinite().all())


def _not_a_checkpoint(path: str | Path, error: Exception) -> CommandError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        reason = "it holds more than plain data, which is not loaded"
    elif isinstance(error, zipfile.BadZipFile):
        reason = f"it is damaged ({reason})"
    elif isinstance(error, KeyError):
        reason = f"it has no {reason}"
    return CommandError(f"{path} is not a checkpoint of experiments.mnist: {reason}")
