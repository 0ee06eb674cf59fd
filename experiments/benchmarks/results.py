"""What a benchmark returns: a title, rows of named figures, and a note on how to read them."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


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
