"""Checkpoints of trained models: reading them."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from dglm import DGLM
from experiments.command import CommandError

_PARTS = ("hyper_parameters", "state_dict", "ImageDataModule")


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
    before, now = _flat(trained), _flat(present)
    for name in sorted(before | now):
        if before.get(name) != now.get(name):
            raise CommandError(
                f"{folder} was trained with another model ({name} was {before.get(name)}, is now "
                f"{now.get(name)}); resume it with the options of its config.yaml"
            )


def _finite(value: torch.Tensor) -> bool:
    return bool(value.isfinite().all())


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries and lists by their path."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name.removeprefix("."): value}
    return {
        path: leaf
        for key, item in value.items()
        for path, leaf in _flat(item, f"{name}.{key}").items()
    }


def _not_a_checkpoint(path: str | Path, error: Exception) -> CommandError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        reason = "it holds more than plain data, which is not loaded"
    elif isinstance(error, zipfile.BadZipFile):
        reason = f"it is damaged ({reason})"
    elif isinstance(error, KeyError):
        reason = f"it has no {reason}"
    return CommandError(f"{path} is not a checkpoint of experiments.mnist: {reason}")
