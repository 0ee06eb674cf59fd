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


def run(command: str, arguments: list[str], point: str) -> Run:
    """Return a run that a signal ends at a point, by default SIGKILL."""
    signal = point.split()[0] if point.startswith("SIG") else "SIGKILL"
    return command, arguments, point.removeprefix(f"{signal} "), signal


def status(point: str) -> int:
    """Return the exit status of such a run."""
    return {"SIGINT": 130, "SIGTERM": 143}.get(point.split()[0], -9)


def told(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("SIG")]


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
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    points = ["noise 100", "writing 2", "SIGINT noise 250", "renaming 2", "noise 400"]
    points += ["writing 3", "SIGTERM noise 57", "noise 57"]
    beginnings = [[*TARGETS, f"--output={folder}"] for folder in (whole, ended)]
    given = [*beginnings, *[["--resume", str(ended)]] * len(points)]
    runs = zip(given, ["never", *points, "never"], strict=True)
    statuses, errors = in_processes([run("targets.__main__", *each) for each in runs])
    assert statuses == [0, *map(status, points), 0]
    hint = f"go on with python -m experiments.targets --resume {ended}"
    assert told(errors) == [f"SIGINT: {hint}", f"SIGTERM: {hint}"]
    assert figures(ended) == figures(whole)
    for found, expected in zip(trained(ended), trained(whole), strict=True):
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


POINTS = {
    "posterior": [
        *("SIGINT noise 5", "noise 30", "SIGINT noise 100", "noise 100", "writing 1"),
        *("renaming 3", "SIGTERM noise 50", "noise 50"),
    ],
    "evaluate": ["noise 3", "writing 2", "SIGTERM noise 3", "noise 3", "renaming 4"],
}


@pytest.mark.parametrize("command", TRAINED)
def test_work_on_a_checkpoint(
    command: str, in_processes: InProcesses, checkpoint: Path, root: Path, tmp_path: Path
) -> None:
    """Killed or stopped in warm-ups, chains or batches, while saving, and before results stand."""
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    shared = [f"--checkpoint={checkpoint}", f"--data.root={root}", *TRAINED[command]]
    points = POINTS[command]
    statuses, errors = in_processes(
        [
            run(command, [*shared, f"--output={folder / FILES[command][0]}"], point)
            for folder, each in ((whole, []), (ended, points))
            for point in [*each, "never"]
        ]
    )
    assert statuses == [0, *map(status, points), 0]
    hint = "what is finished is kept; the same command goes on after it"
    hints = ["nothing was saved" if point == "SIGINT noise 5" else hint for point in points]
    signals = [(point.split()[0], each) for point, each in zip(points, hints, strict=True)]
    # Scores of seconds may warn beside it.
    assert told(errors) == [": ".join(pair) for pair in signals if pair[0].startswith("SIG")]
    assert "Traceback" not in errors
    for file in FILES[command]:
        assert (ended / file).read_bytes() == (whole / file).read_bytes()
    assert len(list(ended.iterdir())) == 2
