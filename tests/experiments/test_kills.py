"""Long computations that are killed at any point end as if nothing had been."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = tuple[str, list[str], str, str]
InProcesses = Callable[[list[Run]], tuple[list[int], str]]

TARGETS = [
    "--target=scg",
    """--samplers=["learned", "the paper's way", "jumps, the paper's setting"]""",
    "--num_iterations=10",
    "--num_chains=20",
    "--num_steps=50",
    "--compile=false",
    "--quiet=true",
]
"""Stages of learning, its chains, 10 steps of training, its chains, and more of both."""


def trained(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "checkpoints").iterdir())
    files = [file for file in files if file.name.startswith("training")]
    assert [file.name for file in files] == ["training-jumps.pt", "training-paper.pt"]
    return [torch.load(file, weights_only=True) for file in files]


def figures(folder: Path) -> list[dict[str, Any]]:
    """Return the rows without what depends on the clock."""
    rows = json.loads((folder / "results.json").read_text())
    assert all(row["seconds"] > 0 and row["training_seconds"] > 0 for row in rows)
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_a_comparison_of_samplers(in_processes: InProcesses, tmp_path: Path) -> None:
    """Killed or stopped in stages of learning, while saving, in trainings, in chains."""
    whole, killed, stopped = (tmp_path / name for name in ("whole", "killed", "stopped"))

    def start(folder: Path, point: str, signal: str = "SIGKILL") -> Run:
        return "targets.__main__", [*TARGETS, f"--output={folder}"], point, signal

    def resume(folder: Path, point: str, signal: str = "SIGKILL") -> Run:
        return "targets.__main__", ["--resume", str(folder)], point, signal

    runs = [
        start(whole, "never"),
        start(killed, "noise 100"),
        resume(killed, "writing 2"),
        resume(killed, "renaming 2"),
        resume(killed, "noise 400"),
        resume(killed, "writing 3"),
        resume(killed, "noise 57"),
        resume(killed, "never"),
        start(stopped, "noise 250", "SIGINT"),
        resume(stopped, "noise 700", "SIGTERM"),
        resume(stopped, "never"),
    ]
    statuses, errors = in_processes(runs)
    assert statuses == [0, -9, -9, -9, -9, -9, -9, 0, 130, 143, 0]
    hint = "go on with python -m experiments.targets --resume"
    signals = [line for line in errors.splitlines() if line.startswith("SIG")]
    assert signals == [f"SIGINT: {hint} {stopped}", f"SIGTERM: {hint} {stopped}"]
    for folder in (killed, stopped):
        assert figures(folder) == figures(whole)
        for found, expected in zip(trained(folder), trained(whole), strict=True):
            assert found["kernel"].keys() == expected["kernel"].keys()
            assert all(map(torch.equal, found["kernel"].values(), expected["kernel"].values()))
            assert torch.equal(found["position"], expected["position"])


TRAINED = {
    "posterior": [
        *("--num_chains=10", "--num_steps=120", "--num_warmup=20", "--quiet=true"),
    ],
    "evaluate": [
        *("--num_images=10", "--num_chains=3", "--num_temperatures=10", "--num_leapfrogs=2"),
        *("--start=prior", "--batch_size=4", "--trainer.accelerator=cpu", "--quiet=true"),
    ],
}
"""Of an evaluation in three batches; of long chains whose first 20 steps adapt HMC, and 20 more
warm the model's kernel up."""
FILES = {"posterior": ("result.png", "result.json"), "evaluate": ("result.json", "result.csv")}


@pytest.mark.parametrize(
    ("command", "killed", "stopped", "told"),
    [
        (
            "posterior",
            ["noise 30", "noise 100", "writing 1", "renaming 3", "noise 150"],
            [("noise 5", "SIGINT"), ("noise 100", "SIGINT"), ("noise 150", "SIGTERM")],
            ["SIGINT: nothing was saved", "SIGINT: {}", "SIGTERM: {}"],
        ),
        (
            "evaluate",
            ["noise 3", "writing 2", "noise 3", "renaming 4"],
            [("noise 70", "SIGTERM")],
            ["SIGTERM: {}"],
        ),
    ],
)
def test_work_on_a_checkpoint(
    command: str,
    killed: list[str],
    stopped: list[tuple[str, str]],
    told: list[str],
    in_processes: InProcesses,
    checkpoint: Path,
    root: Path,
    tmp_path: Path,
) -> None:
    """Killed or stopped in warm-ups, chains or batches, while saving, and before results stand."""

    def run(name: str, point: str, signal: str = "SIGKILL") -> Run:
        output = f"--output={tmp_path}/{name}/{FILES[command][0]}"
        shared = [f"--checkpoint={checkpoint}", f"--data.root={root}", output]
        return command, [*shared, *TRAINED[command]], point, signal

    runs = [run("whole", "never"), *(run("killed", point) for point in killed)]
    runs += [run("killed", "never"), *(run("stopped", *rest) for rest in stopped)]
    statuses, errors = in_processes([*runs, run("stopped", "never")])
    of_signals = [{"SIGINT": 130, "SIGTERM": 143}[signal] for _, signal in stopped]
    assert statuses == [0, *[-9] * len(killed), 0, *of_signals, 0]
    hint = "what is finished is kept; the same command goes on after it"
    signals = [line for line in errors.splitlines() if line.startswith("SIG")]
    assert signals == [line.format(hint) for line in told]  # scores of seconds may warn beside it
    assert "Traceback" not in errors
    for name in ("killed", "stopped"):
        for file in FILES[command]:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
        assert len(list((tmp_path / name).iterdir())) == 2
