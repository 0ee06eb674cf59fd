"""The results of the curve: a row for each score, and paired differences between the kernels."""

import csv
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from experiments.json_files import read_json
from experiments.likelihood_curve.options import LikelihoodCurve, Model, Split
from experiments.scoring import mean_and_error

COMPARED = (("l2hmc", "hmc"), ("l2hmc", "none"), ("hmc", "none"))
"""Which kernels' scores are subtracted from which, image by image."""


def finished_rows(options: LikelihoodCurve, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each score that is there."""
    return [
        {
            **read_json(folder / model.name / "training.json"),
            **read_json(folder / model.name / f"{split}.json"),
            **model._asdict(),
        }
        for model in options.models()
        for split in options.splits
        if (folder / model.name / f"{split}.json").exists()
    ]


def differences(options: LikelihoodCurve, folder: Path) -> list[dict[str, Any]]:
    """Return the differences between kernels over the same images, for each number of steps.

    A seed gives a mean over images and its standard error; the seeds are the replicates.
    """
    found = []
    for split in options.splits:
        for steps in sorted(set(options.num_mh_steps)):
            for better, worse in COMPARED:
                seeds = {
                    str(seed): pair
                    for seed in dict.fromkeys(options.seeds)
                    if (pair := _paired(folder, split, steps, seed, better, worse)) is not None
                }
                if seeds:
                    row = {"split": split, "num_mh_steps": steps, "of": better, "minus": worse}
                    values = [difference for difference, _ in seeds.values()]
                    found.append({**row, **across_seeds(values), "seeds": seeds})
    return found


def across_seeds(values: list[float]) -> dict[str, float | None]:
    """Return the mean over seeds and its standard error, unknown for a single seed."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"difference": mean(values), "standard_error": error}


def _paired(
    folder: Path, split: Split, steps: int, seed: int, better: str, worse: str
) -> tuple[float, float] | None:
    scores = []
    for kernel in (better, worse):
        model = Model(kernel, 1 if kernel == "none" else steps, seed)  # type: ignore[arg-type]
        path = folder / model.name / f"{split}.csv"
        if not path.exists():
            return None
        with path.open(newline="") as file:
            scores.append([float(row["log_likelihood"]) for row in csv.DictReader(file)])
    pairs = [a - b for a, b in zip(*scores, strict=True)]
    return mean_and_error(torch.tensor(pairs, dtype=torch.float64))


def markdown(rows: list[dict[str, Any]], paired: list[dict[str, Any]]) -> str:
    """Return the scores and the differences as tables."""
    lines = [
        "| kernel | MH steps | seed | split | log p(x), nats | gradients an update | updates |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = "" if row["kernel"] == "none" else row["num_mh_steps"]
        score = f"{row['log_likelihood']:.2f} ± {row['standard_error']:.2f}"
        cells = [row["kernel"], steps, row["seed"], row["split"], score]
        cells += [row["gradients_per_update"], row["updates"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "| difference | MH steps | split | mean over seeds, nats | each seed, ± over images |",
        "|---|---|---|---|---|",
    ]
    for row in paired:
        error = row["standard_error"]
        across = f"{row['difference']:+.2f}" + ("" if error is None else f" ± {error:.2f}")
        seeds = ", ".join(f"{value:+.2f} ± {bar:.2f}" for value, bar in row["seeds"].values())
        name = f"{row['of']} − {row['minus']}"
        cells = [name, row["num_mh_steps"], row["split"], across, seeds]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
