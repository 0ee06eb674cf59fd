"""Files that are whole or not there, at whatever moment a process is killed."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch


def save_whole(content: object, path: Path) -> None:
    """Write plain data and tensors into a file; until all is on the disk, the former one stays."""
    write_beside(content, path).replace(path)


def write_beside(content: object, path: Path) -> Path:
    """Write what is to replace a file down to the disk, beside it, and return where."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def write_whole(text: str, path: Path) -> None:
    """Write text into a file; until all is written, the former one stays."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def load_plain(path: Path) -> dict[str, Any]:
    """Return what :func:`save_whole` wrote, on the CPU; nothing in the file is executed.

    Raises:
        ValueError: The file is damaged or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise _unreadable(path, str(error).strip().split("\n")[0]) from error
    if not isinstance(content, dict):
        raise _unreadable(path, f"it holds a {type(content).__name__}")
    return content


def _unreadable(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} cannot be gone on from ({reason}): remove it to start again")
