"""Runs that are killed, stopped or fail: nothing is lost, and they end as if nothing had been."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dglm import DGLM
from experiments import mnist
from experiments.shared.checkpoints import LastTwo, last_checkpoint
from experiments.shared.cli import run_command

Arguments = Callable[..., list[str]]
Run = tuple[str, list[str], str, str]
InProcesses = Callable[[list[Run]], tuple[list[int], str]]

NEVER = ("never", "SIGKILL")


class Processes(NamedTuple):
    """What real processes left behind."""

    folder: Path
    statuses: list[int]
    """Exit statuses, in order; minus the signal where one ended the process."""
    errors: str
    """What they wrote to stderr."""


def content(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def leaves(value: Any) -> list[Any]:
    """Return what is in nested dictionaries and lists, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def check_same_end(one: Path, other: Path) -> None:
    """Check that two runs ended with the same weights, moments and figures, to the bit."""
    for part in ("state_dict", "optimizer_states"):
        pairs = zip(leaves(content(one)[part]), leaves(content(other)[part]), strict=True)
        for first, second in pairs:
            assert first is second or torch.equal(*map(torch.as_tensor, (first, second)))
    first, second = (json.loads((run / "summary.json").read_text()) for run in (one, other))
    assert first == second


KILLED = {
    "none": ["step 5", "writing 1"],
    "hmc": ["update 7", "between"],
    "l2hmc": ["writing 3", "validation 8"],
}


@pytest.fixture(scope="module")
def processes(
    small: Arguments, in_processes: InProcesses, tmp_path_factory: pytest.TempPathFactory
) -> Processes:
    """Run experiments.mnist, in real processes, whole, killed and stopped."""
    folder = tmp_path_factory.mktemp("faults")
    runs: list[Run] = []
    for kernel, points in KILLED.items():
        changes = {"kernel": kernel, "trainer__max_steps": 12}
        killed = folder / f"killed-{kernel}"
        runs.append(("mnist", small(folder / f"whole-{kernel}", **changes), *NEVER))
        runs.append(("mnist", small(killed, **changes), points[0], "SIGKILL"))
        resumed = ["--resume", str(killed)]
        runs += [("mnist", resumed, points[1], "SIGKILL"), ("mnist", resumed, *NEVER)]
    changes = {"kernel": "hmc", "trainer__max_steps": 12, "trainer__val_check_interval": 100}
    runs.append(("mnist", small(folder / "stopped", **changes), "step 5", "SIGINT"))
    resumed = ["--resume", str(folder / "stopped")]
    runs += [("mnist", resumed, "update 7", "SIGTERM"), ("mnist", resumed, *NEVER)]
    # Validations in the middle of an update, and updates of what an epoch of 18 batches has left.
    changes |= {"trainer__val_check_interval": 3, "trainer__accumulate_grad_batches": 4}
    runs.append(("mnist", small(folder / "whole-accumulated", **changes), *NEVER))
    runs.append(("mnist", small(folder / "accumulated", **changes), "update 6", "SIGKILL"))
    resumed = ["--resume", str(folder / "accumulated")]
    runs += [("mnist", resumed, "update 9", "SIGTERM"), ("mnist", resumed, *NEVER)]
    return Processes(folder, *in_processes(runs))


@pytest.mark.parametrize("kernel", KILLED)
def test_a_killed_run_ends_where_the_uninterrupted_one_does(
    kernel: str, processes: Processes
) -> None:
    first = 4 * list(KILLED).index(kernel)
    assert processes.statuses[first : first + 4] == [0, -9, -9, 0]
    check_same_end(*(processes.folder / f"{name}-{kernel}" for name in ("whole", "killed")))
    before = processes.folder / f"killed-{kernel}" / "metrics-before-001.csv"
    assert before.read_text().count("\n") > 1


def test_a_stopped_run_saves_and_says_how_to_go_on(processes: Processes) -> None:
    run = processes.folder / "stopped"
    assert processes.statuses[12:15] == [130, 143, 0]
    hint = f"go on with python -m experiments.mnist --resume {run}"
    told = [line for line in processes.errors.splitlines() if line.startswith("SIG")]
    assert told[:2] == [f"SIGINT: {hint}", f"SIGTERM: {hint}"]
    assert "Traceback" not in processes.errors
    check_same_end(processes.folder / "whole-hmc", run)
    steps = [
        torch.load(run / "checkpoints" / name, weights_only=True)["global_step"]
        for name in ("previous.ckpt", "last.ckpt")
    ]
    assert steps == [8, 12]


def test_no_half_of_an_update_is_lost_where_batches_are_accumulated(processes: Processes) -> None:
    assert processes.statuses[15:] == [0, -9, 143, 0]
    check_same_end(*(processes.folder / name for name in ("whole-accumulated", "accumulated")))


def test_a_finished_run_can_be_made_longer(small: Arguments, tmp_path: Path) -> None:
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    constant = {"kernel": "l2hmc", "model__decay_share": 0}
    mnist.main(small(whole, **constant, trainer__max_steps=7))
    mnist.main(small(longer, **constant, trainer__max_steps=5))
    first = (longer / "config.yaml").read_text()
    mnist.main(["--resume", str(longer), "--trainer.max_steps", "7"])
    check_same_end(whole, longer)
    # Its configuration says so, and the former one is kept; as a hint says, after an interruption:
    mnist.main(["--resume", str(longer)])
    assert (longer / "config-before-001.yaml").read_text() == first
    assert (longer / "config.yaml").read_text() == first.replace("max_steps: 5", "max_steps: 7")
    assert not (longer / "config-before-002.yaml").exists()


def test_a_run_that_fails_leaves_a_checkpoint_and_one_line(
    small: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DGLM.training_step

    def failing(self: DGLM, x: torch.Tensor, index: int) -> torch.Tensor:
        return step(self, x, index) * (torch.nan if self.global_step >= 5 else 1)

    monkeypatch.setattr(DGLM, "training_step", failing)
    given = small(tmp_path / "run", trainer__max_steps=60, trainer__val_check_interval=100)
    with pytest.raises(SystemExit, match="error: the loss or its gradient was not finite in 15"):
        run_command(lambda: mnist.main(given))
    saved = content(tmp_path / "run")
    assert saved["global_step"] == 20
    assert saved["callbacks"]["Safeguard"]["skipped"] == 15
    assert all(torch.as_tensor(leaf).isfinite().all() for leaf in leaves(saved["state_dict"]))


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    writer, run = LastTwo(), tmp_path / "run"
    last, previous = (run / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    assert last_checkpoint(run) == last
    for step in range(3):
        writer.save_checkpoint({"step": step}, last)
    assert [torch.load(path) for path in (previous, last)] == [{"step": 1}, {"step": 2}]
    assert {path.name for path in last.parent.iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert last_checkpoint(run) == last
    last.unlink()
    assert last_checkpoint(run) == previous


def test_a_checkpoint_is_saved_every_five_minutes(
    small: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.shared.checkpoints._SAVE_SECONDS", 0)
    saved, save = [], LastTwo.save_checkpoint

    def recording(
        self: LastTwo, checkpoint: dict[str, Any], *arguments: Any, **options: Any
    ) -> None:
        saved.append(checkpoint["global_step"])
        save(self, checkpoint, *arguments, **options)

    monkeypatch.setattr(LastTwo, "save_checkpoint", recording)
    mnist.main(small(tmp_path / "run", kernel="none"))
    assert saved == [1, 2, 3, 4]
