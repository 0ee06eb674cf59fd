"""The table of the comparison, of one run or, as a command, of all runs in a folder."""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser

from experiments.shared.cli import CommandError, run_command, with_switches
from experiments.shared.runs import read_json

PAPER_ESS = {"icg": 0.783, "rough_well": 0.625, "scg": 0.497, "mog": 0.0324}
"""The paper's effective sample sizes of L2HMC per step (Table 1)."""

_COLUMNS = {
    "ess": "ESS/step",
    "ess_cut": "with the 0.05 cut",
    "ess_squares": "ESS of x²/step",
    "min_coordinate_ess": "worst coordinate",
    "ess_per_gradient": "ESS/gradient",
    "ess_squares_per_gradient": "x²/gradient",
    "min_coordinate_ess_per_gradient": "worst/gradient",
    "ess_per_second": "ESS/s",
    "acceptance": "acceptance",
    "r_hat": "R̂, worst",
}


_PEER = "NUTS, blackjax"
_BRIEF = ("ess_cut", "ess", "ess_squares", "min_coordinate_ess_per_gradient", "r_hat")
_BRIEF_SAMPLERS = ("L2HMC", "L2HMC, whitened", "HMC, dense mass, tuned")


def markdown(rows: list[dict[str, Any]], brief: bool = False) -> str:
    """Return a table: a line for each target and sampler, medians over seeds, all seeds' ESS.

    The brief one has fewer columns and samplers, and the paper's figures in place of the seeds'.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if not brief or row["sampler"] in _BRIEF_SAMPLERS:
            groups[row["target"], row["sampler"]].append(row)
    columns = _BRIEF if brief else tuple(_COLUMNS)
    names = [_COLUMNS[key] for key in columns]
    named = ["paper's ESS/step", *names] if brief else ["settings", *names, "ESS/step by seed"]
    header = ["target", "sampler", *named]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for (target, sampler), group in groups.items():
        # NumPy's median, which is unknown where one of the seeds' is.
        numbers = [f"{np.median([row[key] for row in group]):.3g}" for key in columns]
        if brief:
            paper = f"{PAPER_ESS[target]}" if sampler == "L2HMC" and target in PAPER_ESS else ""
            cells = [paper, *numbers]
        else:
            cells = [_settings(group), *numbers, _by_seed(group)]
        lines.append("| " + " | ".join([target, sampler, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _settings(group: list[dict[str, Any]]) -> str:
    """Return those of the seeds in turn, once where they are the same."""
    return "; ".join(dict.fromkeys(row["settings"] for row in _in_turn(group)))


def _by_seed(group: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{row['ess']:.3g} ± {row['ess_standard_error']:.2g}" for row in _in_turn(group)
    )


def _in_turn(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(group, key=lambda row: row["seed"])


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Return effective sample sizes a second, over NUTS's of the same run, medians over seeds.

    With training, the seconds that it, a warm-up or a search of settings took are counted too.
    """
    measures = {"ESS": "ess", "worst coordinate": "min_coordinate_ess"}
    header = [f"{name}{how}" for name in measures for how in ("", ", with training")]
    lines = ["| " + " | ".join(["target", "sampler", *header]) + " |", "|---" * 6 + "|"]
    ratios: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    peers = {(row["target"], row["seed"]): row for row in rows if row["sampler"] == _PEER}
    for row in rows:
        if (peer := peers.get((row["target"], row["seed"]))) and row is not peer:
            speeds, theirs = _speeds(row, measures.values()), _speeds(peer, measures.values())
            ratio = [own / other for own, other in zip(speeds, theirs, strict=True)]
            ratios[row["target"], row["sampler"]].append(ratio)
    for (target, sampler), seeds in ratios.items():
        numbers = [f"{np.median(column):.2g}" for column in zip(*seeds, strict=True)]
        lines.append("| " + " | ".join([target, sampler, *numbers]) + " |")
    return "\n".join(lines) + "\n"


def _speeds(row: dict[str, Any], measures: Iterable[str]) -> list[float]:
    draws = row["num_steps"] * row["num_chains"]
    seconds = row["seconds"], row["seconds"] + row["training_seconds"]
    return [row[measure] * draws / time for measure in measures for time in seconds]


def _identity(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["target"], row["seed"], row["sampler"]


def main(arguments: list[str] | None = None) -> None:
    """Print the table of all finished runs."""
    parser = ArgumentParser(
        prog="python -m experiments.targets.table", description=__doc__, exit_on_error=False
    )
    parser.add_argument("--runs", default="runs/targets", help="Folder of the runs.")
    parser.add_argument("--brief", type=bool, default=False, help="The README's table.")
    parser.add_argument("--speed", type=bool, default=False, help="Speeds beside NUTS's instead.")
    options = parser.parse_args(with_switches(sys.argv[1:] if arguments is None else arguments))
    folder = Path(options.runs)
    files = sorted(folder.glob("*/results.json"))
    if not files:
        raise CommandError(f"there is no finished run in {folder}")
    rows = [row for file in files for row in read_json(file)]
    for (target, seed, sampler), count in Counter(map(_identity, rows)).items():
        if count > 1:
            raise CommandError(
                f"{folder} has {count} runs of {target} with seed {seed} ({sampler}): leave one of "
                "them, or name another folder with --runs"
            )
    print(speed_table(rows) if options.speed else markdown(rows, options.brief), end="")


if __name__ == "__main__":
    run_command(main)
