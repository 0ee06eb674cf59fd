"""Time the samplers beside peers and beside what the matrix products alone take."""

import json
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.chains import small_target
from experiments.benchmarks.decoders import annealing, posterior, sampler_update
from experiments.benchmarks.timing import Workload, run
from experiments.command import CommandError, run_command

Name = Literal["w1", "w2", "w3", "w4"]

WORKLOADS: dict[str, list[Callable[[], Workload]]] = {
    "w1": [small_target],
    "w2": [partial(posterior, [1024, 1024]), partial(posterior, [200, 200])],
    "w3": [partial(annealing, [1024, 1024]), partial(annealing, [200, 200])],
    "w4": [sampler_update],
}


def main(arguments: list[str] | None = None) -> None:
    """Time, as the arguments say; by default those of the command line."""
    parser = ArgumentParser(
        prog="python -m experiments.benchmarks", description=__doc__, exit_on_error=False
    )
    parser.add_argument("workloads", nargs="*", type=Name, help="w1, w2, w3, w4; all by default.")
    parser.add_argument("--output", type=str | None, default=None, help="Results, a .json file.")
    parsed = parser.parse_args(arguments)
    output = None if parsed.output is None else Path(parsed.output)
    if output is not None and output.exists():
        raise CommandError(f"{output} exists already; choose another --output")
    results = []
    for name in parsed.workloads or list(WORKLOADS):
        for build in WORKLOADS[name]:
            results.append({"workload": name, **run(build())})
            show(results[-1])
    if output is not None:
        content = {"machine": machine(), "results": results}
        output.write_text(json.dumps(content, indent=2) + "\n")


def show(result: dict[str, Any]) -> None:
    """Print one workload's table, ratios first."""
    table = Table(title=f"{result['workload']}: {result['title']}")
    for column in ("", f"speed / {result['reference']}", "median, s", "quartiles, s"):
        table.add_column(column, justify="left" if not column else "right")
    for row in result["rows"]:
        low, high = row["quartiles_seconds"]
        table.add_row(
            row["contender"],
            f"{row['speed_ratio']:.2f}",
            f"{row['median_seconds']:.4g}",
            f"{low:.4g} – {high:.4g}",
        )
    console = Console()
    console.print(table)
    console.print(f"equal to a relative {result['checks']}", highlight=False)


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "blackjax", "jax"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        **versions,
    }


if __name__ == "__main__":
    run_command(main)
