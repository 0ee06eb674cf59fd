"""Checkpoints of trained models."""

import pickle
from pathlib import Path
from typing import Any

import torch

from dglm import DGLM
from experiments.command import CommandError


def load_checkpoint(path: str) -> tuple[DGLM, dict[str, Any]]:
    """Return a trained model, ready to use, and what it was trained on.

    Raises:
        CommandError: The file is missing, damaged or not a DGLM's checkpoint.
    """
    if not Path(path).is_file():
        raise CommandError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        trained = content["ImageDataModule"]
        dglm = DGLM.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CommandError(f"{path} is not a checkpoint of experiments.mnist: {reason}") from error
    return dglm.eval(), trained
