"""The table of all finished comparisons, medians over seeds, and a CSV of every seed."""

import csv
import io
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser

from experiments.shared.cli import CommandError, run_command, with_switches
from experiments.shared.runs import read_json
from samplers.io import write_whole

_PEER = "NUTS, blackjax"
_COLUMNS = {
    "min_coordinate_ess_per_gradient": "worst ESS/gradient",
    "r_hat": "R̂",
    "error_of_moments": "moments off by",
    "ess": "paper's ESS of x/step",
    "min_coordinate_ess_of_squares": "x²/step, worst",
    "acceptance": "acceptance",
    "training_gradients": "training, gradients",
    "training_seconds": "training, s",
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return a table of medians over seeds, a line for each target and sampler."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["target"], row["sampler"]].append(row)
    header = ["target", "sampler", "settings", *_COLUMNS.values(), "worst seed's ESS/gradient"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for (target, sampler), group in groups.items():
        # NumPy's median, which is unknown where one of the seeds' is.
        numbers = [f"{np.median([row[key] for row in group]):.3g}" for key in _COLUMNS]
        least = f"{min(row['min_coordinate_ess_per_gradient'] for row in group):.3g}"
        turn = sorted(group, key=lambda row: row["seed"])
        settings = "; ".join(dict.fromkeys(row["settings"] for row in turn))
        lines.append("| " + " | ".join([target, sampler, settings, *numbers, least]) + " |")
    return "\n".join(lines) + "\n"


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Return every row of every seed."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow(short)
    return text.getvalue()


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Return seconds, training and all, to a worst ESS of 10⁴ and of 10⁶, medians over seeds.

    The last column is the draws after which training has paid beside NUTS of the same seed, its
    warm-up counted: 0 where it is ahead from the first, "never" where a draw costs more.
    """
    header = ["target", "sampler", "training, s", "s to 10⁴", "s to 10⁶", "ahead of NUTS after"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    peers = {(row["target"], row["seed"]): row for row in rows if row["sampler"] == _PEER}
    groups: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for row in rows:
        cost, training = _seconds_a_draw(row), row["training_seconds"]
        peer, after = peers.get((row["target"], row["seed"])), float("nan")
        if peer is not None and peer is not row:
            gain = _seconds_a_draw(peer) - cost
            extra = training - peer["training_seconds"]
            after = max(0.0, extra / gain) if gain > 0 else float("inf")
        figures = [training, training + 1e4 * cost, training + 1e6 * cost, after]
        groups[row["target"], row["sampler"]].append(figures)
    for (target, sampler), seeds in groups.items():
        medians = [float(np.median(column)) for column in zip(*seeds, strict=True)]
        cells = ["never" if value == float("inf") else f"{value:.2g}" for value in medians]
        if sampler == _PEER:
            cells[-1] = ""
        lines.append("| " + " | ".join([target, sampler, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _seconds_a_draw(row: dict[str, Any]) -> float:
    draws = row["min_coordinate_ess"] * row["num_steps"] * row["num_chains"]
    return row["seconds"] / draws if draws > 0 else float("inf")


def main(arguments: list[str] | None = None) -> None:
    """Print the table of all finished runs."""
    parser = ArgumentParser(
        prog="python -m experiments.targets.table", description=__doc__, exit_on_error=False
    )
    parser.add_argument("--runs", default="runs/targets", help="Folder of the runs.")
    parser.add_argument("--speed", type=bool, default=False, help="Seconds instead.")
    parser.add_argument("--csv", default=None, help="File for the rows of every seed.")
    options = parser.parse_args(with_switches(sys.argv[1:] if arguments is None else arguments))
    folder = Path(options.runs)
    files = sorted(folder.glob("*/results.json"))
    if not files:
        raise CommandError(f"there is no finished run in {folder}")
    rows = [row for file in files for row in read_json(file)]
    identities = Counter((row["target"], row["seed"], row["sampler"]) for row in rows)
    for (target, seed, sampler), count in identities.items():
        if count > 1:
            raise CommandError(
                f"{folder} has {count} runs of {target} with seed {seed} ({sampler}): leave one of "
                "them, or name another folder with --runs"
            )
    if options.csv is not None:
        write_whole(as_csv(rows), Path(options.csv))
    print(speed_table(rows) if options.speed else markdown(rows), end="")


if __name__ == "__main__":
    run_command(main)
