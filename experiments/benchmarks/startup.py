"""How long a user waits for the first update of the default training, compilation included."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from experiments.benchmarks.results import device_name
from experiments.shared.cli import CommandError

_MARK = "update ended at"
_CALLBACK = '[{"class_path": "experiments.benchmarks.startup.EndOfUpdates"}]'


class EndOfUpdates(Callback):
    """Prints when and where each update ended, on the clock that all processes share."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *arguments: Any
    ) -> None:
        """Print it."""
        print(_MARK, time.monotonic(), device_name(pl_module.device), flush=True)


def startup(
    options: Sequence[str] = ("--data.name", "mnist-5k"),
    updates: int = 40,
    compile: Sequence[str] = ("true", "true", "false"),
) -> dict[str, Any]:
    """Time real commands: compiled without a cache, compiled with the one just made, eager."""
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for number, compiled in enumerate(compile):
            cached = ", cached" if compiled in compile[:number] else ""
            arguments = [*options, "--compile", compiled, "--output", f"{folder}/{number}"]
            seconds = _seconds(arguments, f"{folder}/cache", updates)
            rows.append({"training": f"--compile {compiled}{cached}", **seconds})
    return {
        "title": "python -m experiments.mnist, from the command to the end of an update",
        "rows": rows,
        "note": f"later updates: median of {updates - 1}",
    }


def _seconds(arguments: Sequence[str], cache: str, updates: int) -> dict[str, float | str]:
    command = [sys.executable, "-m", "experiments.mnist", *arguments]
    command.append(f"--trainer.callbacks={_CALLBACK}")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        ends = list(islice(_ends(child.stdout), updates))
        child.kill()
    if len(ends) < updates:
        raise CommandError(f"the training ended early, with exit status {child.returncode}")
    times, devices = zip(*ends, strict=True)
    return {
        "device": devices[0],
        "first_update_seconds": times[0] - began,
        "later_updates_seconds": median(after - before for before, after in pairwise(times)),
    }


def _ends(lines: Iterator[str]) -> Iterator[tuple[float, str]]:
    for line in lines:
        _, mark, found = line.partition(_MARK)
        if mark:
            at, _, device = found.strip().partition(" ")
            yield float(at), device
