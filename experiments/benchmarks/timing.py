"""Timing of contenders that take turns, so that a noisy machine is as noisy to each."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Workload:
    """Contenders that do the same work.

    Args:
        title: What the work is.
        reference: The contender that the others are compared with.
        contenders: Each does the work once.
        repeats: Turns of each.
        checks: What was found equal beforehand, and to what error.
    """

    title: str
    reference: str
    contenders: dict[str, Callable[[], object]]
    repeats: int
    checks: dict[str, float]


def compare(build: Callable[[], Workload]) -> dict[str, Any]:
    """Time contenders in turns; return medians, quartiles and ratios to the reference."""
    workload = build()
    seconds: dict[str, list[float]] = {name: [] for name in workload.contenders}
    for work in workload.contenders.values():
        work()
    for _ in range(workload.repeats):
        for name, work in workload.contenders.items():
            seconds[name].append(seconds_of(work))
    reference = median(seconds[workload.reference])
    rows = []
    for name, times in seconds.items():
        low, _, high = quantiles(times, n=4)
        rows.append(
            {
                "contender": name,
                "speed_ratio": reference / median(times),
                "median_seconds": median(times),
                "quartiles_seconds": [low, high],
            }
        )
    return {
        "title": workload.title,
        "rows": rows,
        "note": f"{workload.repeats} turns; speed against {workload.reference}; contenders agree "
        f"to a relative {workload.checks}",
    }


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of some work that has been done once before."""
    work()
    return median(seconds_of(work) for _ in range(repeats))


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes, on a GPU until it is done there."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def agree(what: str, first: torch.Tensor, second: torch.Tensor, bound: float) -> dict[str, float]:
    """Return the largest difference in units of the largest value.

    Raises:
        RuntimeError: It is beyond the bound: the contenders do not do the same work.
    """
    difference = float((first - second).abs().max() / second.abs().max())
    if not difference <= bound:
        raise RuntimeError(f"{what} differs by {difference:.2g} between contenders")
    return {what: difference}


def show(result: dict[str, Any]) -> None:
    """Print the rows of one result as a table, its note below."""
    table = Table(title=f"{result['benchmark']}: {result['title']}")
    for column in result["rows"][0]:
        table.add_column(column.replace("_", " "))
    for row in result["rows"]:
        table.add_row(*map(_text, row.values()))
    console = Console()
    console.print(table)
    console.print(result["note"], highlight=False)


def _text(figure: object) -> str:
    if isinstance(figure, list):
        return " – ".join(map(_text, figure))
    return f"{figure:.3g}" if isinstance(figure, float) else str(figure)


def device_name(device: torch.device | str) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def machine() -> dict[str, Any]:
    """Return what the figures were taken on; benchmarks that name no device use the processor."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "blackjax", "jax"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        **versions,
    }
