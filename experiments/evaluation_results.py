"""The results of an evaluation: a file of scores, a picture of the curve, a table."""

import csv
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from dglm import AISResult


def write_scores(path: Path, result: AISResult) -> None:
    """Write the scores of each image, which paired comparisons need."""
    columns = {
        "log_likelihood": result.log_likelihood,
        "standard_error": result.standard_error,
        "effective_sample_size": result.effective_sample_size,
        "acceptance": result.acceptance,
    }
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *columns])
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        writer.writerows([index, *row] for index, row in enumerate(rows))


def draw_curve(points: list[dict[str, Any]], path: Path) -> None:
    """Draw the estimate against the number of temperatures.

    The bars are the part of the error that the chains cause: the images are the same everywhere.
    """
    counts = [point["num_temperatures"] for point in points]
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    axes.errorbar(
        counts,
        [point["log_likelihood"] for point in points],
        yerr=[point["standard_error_chains"] for point in points],
        marker="o",
        capsize=3,
    )
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("temperatures")
    axes.set_ylabel("log p(x), nats")
    axes.set_title(f"{points[0]['num_images']} images, {points[0]['num_chains']} chains each")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def print_table(summary: dict[str, Any], output: Path) -> None:
    """Print the results as a short table, and where the files are."""
    table = Table(title=f"{summary['num_images']} {summary['split']} images, {summary['dataset']}")
    for column in ("", "nats", "standard error", "from chains alone"):
        table.add_column(column, justify="right" if column else "left")
    for point in summary.get("curve", [summary]):
        table.add_row(
            f"AIS, {point['num_temperatures']} temperatures",
            f"{point['log_likelihood']:.3f}",
            f"{point['standard_error']:.3f}",
            f"{point['standard_error_chains']:.3f}",
        )
    if "iwae_bound" in summary:
        figures = f"{summary['iwae_bound']:.3f}", f"{summary['iwae_standard_error']:.3f}"
        table.add_row(f"IWAE bound, {summary['iwae_samples']} samples", *figures, "")
    for key in ("lower", "upper", "gap"):
        if f"bdmc_{key}" in summary:
            figures = (
                f"{summary[f'bdmc_{key}']:.3f}",
                f"{summary[f'bdmc_{key}_standard_error']:.3f}",
            )
            table.add_row(f"BDMC {key}, {summary['bdmc_images']} simulated", *figures, "")
    console = Console()
    console.print(table)
    console.print(
        f"binarization {summary['binarization']}; acceptance {summary['acceptance']:.2f}; "
        f"effective sample size {summary['effective_sample_size']:.1f} of {summary['num_chains']} "
        f"chains; {summary['gradient_evaluations']:.3g} gradients",
        highlight=False,
    )
    for suffix in (".json", ".csv", ".png") if "curve" in summary else (".json", ".csv"):
        console.print(f"  {output.with_suffix(suffix)}", highlight=False, soft_wrap=True)
