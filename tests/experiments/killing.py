"""Run commands in real processes that receive a signal at a chosen point.

Reads from each line of stdin a list of [command, arguments, point, signal]; each run is a fork of
this process, so that the libraries are imported once only. Prints the exit statuses of a list in a
line, minus the signal where one ended the process. A point is a name and a count, as in "noise 13",
or "never".
"""

import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dglm.posterior
import experiments.targets.__main__ as targets
import experiments.targets.contenders as contenders
import samplers.comparison
import samplers.kernel
import samplers.learning
import samplers.training
from dglm import DGLM
from dglm.chain import long_chain_log_joint
from experiments import report
from experiments.shared.cli import run_command

Kill = Callable[[], None]

_save, _replace = torch.save, Path.replace


def before(method: str, cls: type, calls: int, kill: Kill) -> None:
    """Have a method killed when it is called for so manieth time."""
    original, count = getattr(cls, method), 0

    def killed(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            kill()
        return original(self, *arguments, **options)

    setattr(cls, method, killed)


def before_update(method: str, update: int, kill: Kill) -> None:
    """Have a method of the module killed when so many updates are done."""
    original = getattr(DGLM, method)

    def killed(self: DGLM, *arguments: Any, **options: Any) -> Any:
        if self.global_step == update:
            kill()
        return original(self, *arguments, **options)

    setattr(DGLM, method, killed)


def while_writing(number: int, kill: Kill) -> None:
    """Have a process killed when half of its so manieth file is on the disk."""
    count = 0

    def half_written(content: Any, file: Any) -> None:
        nonlocal count
        count += 1
        whole = io.BytesIO()
        _save(content, whole)
        if count == number:
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            kill()
        file.write(whole.getvalue())

    torch.save = half_written


def between_renames(path: Path, target: Path, kill: Kill) -> None:
    if path.suffix == ".tmp" and target.with_name("previous.ckpt").exists():
        kill()
    _replace(path, target)


def plant(point: str, number: int) -> None:
    name, _, count = point.partition(" ")

    def kill() -> None:
        os.kill(os.getpid(), number)

    if name == "step":
        before_update("training_step", int(count), kill)
    elif name == "update":
        before_update("configure_gradient_clipping", int(count), kill)
    elif name == "validation":
        before_update("validation_step", int(count), kill)
    elif name == "noise":  # of a step of a chain, in training too
        before("noise", samplers.kernel.Kernel, int(count), kill)
    elif name == "writing":
        while_writing(int(count), kill)
    elif name == "renaming":
        before("replace", type(Path()), int(count), kill)
    elif name == "between":
        Path.replace = lambda path, target: between_renames(path, target, kill)  # type: ignore


def save_often_and_take_little_time() -> None:
    report.long_chain_log_joint = partial(long_chain_log_joint, num_steps=20)
    report.draw = lambda *arguments: None  # type: ignore[assignment]
    samplers.training._SAVE_INTERVAL = 5
    dglm.posterior._SAVE_SECONDS = 0.0
    samplers.comparison._MULTIPLES, samplers.comparison._ROUNDS = (1.0,), ((1, 1, 1.0),)
    samplers.comparison._FEWEST_DRAWS = 8
    contenders.LENGTHS = (1,)
    contenders._WARM_UP_STEPS = 30
    samplers.learning._CHAINS = contenders._LEARNING_CHAINS = samplers.learning._FLOW_DRAWS = 20
    samplers.learning._Learning._scaled = lambda self, count: max(30, count // 100)
    targets.nuts_is_installed = lambda: False


def run(command: str, arguments: list[str], point: str, number: int) -> int:
    main = importlib.import_module(f"experiments.{command}").main
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
    save_often_and_take_little_time()
    for line in sys.stdin:
        statuses = [run(*rest, signal.Signals[name]) for *rest, name in json.loads(line)]
        print(f"\nstatuses {json.dumps(statuses)}", flush=True)
