"""Run experiments.mnist in real processes that receive a signal at a chosen point.

Reads from stdin a list of [arguments, point, signal]; each run is a fork of this process, so that
the libraries are imported once only. Prints the list of exit statuses, minus the signal where one
ended the process.
"""

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dglm import DGLM
from experiments.command import run_command
from experiments.mnist import main

_save, _replace = torch.save, Path.replace


def before(name: str, update: int, kill: Callable[[], None]) -> None:
    """Have a method of the module killed when so many updates are done."""
    method = getattr(DGLM, name)

    def killed(self: DGLM, *arguments: Any, **options: Any) -> Any:
        if self.global_step == update:
            kill()
        return method(self, *arguments, **options)

    setattr(DGLM, name, killed)


def half_written(checkpoint: dict[str, Any], file: Any, kill: Callable[[], None]) -> None:
    whole = io.BytesIO()
    _save(checkpoint, whole)
    if checkpoint["global_step"] == 6:
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        kill()
    file.write(whole.getvalue())


def between_renames(path: Path, target: Path, kill: Callable[[], None]) -> None:
    if path.suffix == ".tmp" and target.with_name("previous.ckpt").exists():
        kill()
    _replace(path, target)


def plant(point: str, number: int) -> None:
    def kill() -> None:
        os.kill(os.getpid(), number)

    if point == "step":
        before("training_step", 5, kill)
    elif point == "update":
        before("configure_gradient_clipping", 7, kill)
    elif point == "validation":
        before("validation_step", 8, kill)
    elif point == "writing":
        torch.save = lambda checkpoint, file: half_written(checkpoint, file, kill)
    elif point == "renaming":
        Path.replace = lambda path, target: between_renames(path, target, kill)  # type: ignore


def run(arguments: list[str], point: str, number: int) -> int:
    child = os.fork()
    if child == 0:
        plant(point, number)
        try:
            run_command(lambda: main(arguments))
        except SystemExit as ended:
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = json.load(sys.stdin)
    print(
        json.dumps([run(arguments, point, signal.Signals[name]) for arguments, point, name in runs])
    )
