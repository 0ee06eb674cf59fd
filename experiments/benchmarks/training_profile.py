"""Where the time of the default training goes, update by update."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler

from experiments.benchmarks.results import device_name
from experiments.mnist import command_line, train

_FIRST = "run_training_batch"
_DATA = "data path: rows, transfer, binarization"
_PARTS = {
    "chain": ("chain",),
    "encoder and decoder": ("training_step", "validation_step"),
    "backward through all three": ("backward",),
    "optimizer": ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping"),
    "logging of metrics": ("_log",),
    _DATA: (
        "train_dataloader_next",
        "batch_to_device",
        "transfer_batch_to_device",
        "on_after_batch_transfer",
    ),
    "loop of the Trainer": ("run_training_epoch", "run_training_batch"),
}
_INSIDE, _STEP = 3, 4
"""So many of the parts are the networks' own work, and the pure step."""


class SelfTimes(Profiler):
    """Seconds in each of Lightning's actions, those inside it left out, from the second update on.

    The first update compiles.

    Arguments:
        device: Where the training runs; an action on a GPU ends when what it has begun there does.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.total = 0.0
        self._began = 0.0
        self._open: list[list[float]] = []  # when each action began, and what lay inside it

    def start(self, action_name: str) -> None:
        """Begin an action."""
        self._open.append([self._now(), 0.0])

    def stop(self, action_name: str) -> None:
        """End the action that began last."""
        now = self._now()
        began, inside = self._open.pop()
        self.seconds[action_name] += now - began - inside
        if self._open:
            self._open[-1][1] += now - began
        if action_name == _FIRST and not self._began:
            self._began = now
            self.seconds.clear()
            self._open = [[now, 0.0] for _ in self._open]
        self.total = now - self._began

    def time(self, owner: object, method: str) -> None:
        """Make an action of a method of an object."""
        original: Callable[..., Any] = getattr(owner, method)

        @wraps(original)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.profile(method):
                return original(*arguments, **options)

        setattr(owner, method, timed)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


_OPTIONS = ["--data.name", "mnist-5k", "--compile", "true", "--trainer.max_steps", "500"]


def training_profile(options: Sequence[str] = _OPTIONS) -> dict[str, Any]:
    """Profile a whole training, validation, pictures and checkpoints included.

    By default a third of the default training, which is compiled for its length.
    """
    with TemporaryDirectory() as folder:
        cli = command_line([*options, "--output", str(Path(folder) / "run")])
        device = cli.trainer.strategy.root_device
        profiler = SelfTimes(device)
        cli.trainer.profiler = profiler  # type: ignore[attr-defined]
        for method in ("chain", "_log"):
            profiler.time(cli.model, method)
        train(cli)
    seconds = parts(profiler)
    inside, step = (sum(list(seconds.values())[:count]) for count in (_INSIDE, _STEP))
    data = seconds[_DATA]
    return {
        "title": f"python -m experiments.mnist {' '.join(options)}, after the first update",
        "device": device_name(device),
        "rows": [
            {"part": name, "share": spent / profiler.total, "seconds": spent}
            for name, spent in seconds.items()
        ],
        "inside_share": inside / profiler.total,
        "data_overhead": data / step,
        "overhead": profiler.total / step - 1,
        "note": f"{inside / profiler.total:.1%} inside chain, encoder and decoder; to the step "
        f"itself, the first four parts, the data path adds {data / step:.1%}, and all that is not "
        f"the step {profiler.total / step - 1:.1%}",
    }


def parts(profiler: SelfTimes) -> dict[str, float]:
    """Return the seconds of each part; each callback that takes 0.1 % of all is one."""
    seconds = {
        name: sum(spent for action, spent in profiler.seconds.items() if _method(action) in methods)
        for name, methods in _PARTS.items()
    }
    for action, spent in profiler.seconds.items():
        if action.startswith("[Callback]") and spent > 1e-3 * profiler.total:
            seconds[action.removeprefix("[Callback]")] = spent
    return seconds | {"the rest": profiler.total - sum(seconds.values())}


def _method(action: str) -> str:
    return action.rpartition(".")[2]
