"""Figures of inpainting: how chains move among classes, and how far off their frequencies are."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.classes import class_frequencies, movement, total_variation
from experiments.filled_in import InpaintingTask
from experiments.scoring import mean_and_error

NAMES = {
    "encoder": "q",
    "kernel": "kernel",
    "gain": "kernel − q",
    "reference": "posterior",
}
_BURN_IN = 0.2
"""Share of the sweeps that frequencies leave out: chains begin at the whole images."""


def of_chains(hidden: InpaintingTask, classes: Tensor) -> dict[str, Tensor]:
    """Return how each chain moves among classes (sweeps, image · chain), (image, chain) each."""
    return {name: value.view(-1, hidden.num_chains) for name, value in movement(classes).items()}


def class_distances(
    hidden: InpaintingTask, classes: dict[str, Tensor], reference: Tensor
) -> dict[str, Tensor]:
    """Return how far each image's frequencies of the classes are from the reference's, (N,).

    And how far those of one half of the reference's chains are from the other half's: total
    variation grows with the noise of either side, and this much of it is noise.
    """
    first = round(_BURN_IN * hidden.sweeps)
    images = len(hidden.images)
    number = int(hidden.classifier.network.classes_.max()) + 1
    posterior = class_frequencies(reference, images, number)
    distances = {
        name: total_variation(class_frequencies(found[first:], images, number), posterior)
        for name, found in classes.items()
    }
    halves = [
        class_frequencies(half.flatten(1), images, number)
        for half in reference.view(hidden.sweeps, images, -1).tensor_split(2, dim=2)
    ]
    return distances | {"reference": total_variation(*halves)}


def distances_and_errors(distances: dict[str, Tensor]) -> dict[str, float]:
    """Return the means of distances (N,) and their errors over images."""
    summary = {}
    for name, values in distances.items():
        key = f"{name}_distance"
        summary[key], summary[f"{key}_standard_error"] = mean_and_error(values)
    return summary


def means_and_errors(figures: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Return each figure's mean, its error over images, and the part that the chains cause."""
    summary = {}
    for posterior, named in figures.items():
        for name, values in named.items():
            key = f"{posterior}_{name}"
            summary[key], summary[f"{key}_standard_error"] = mean_and_error(values.mean(dim=1))
            error = (values.var(dim=1).sum() / values.shape[1]).sqrt() / len(values)
            summary[f"{key}_standard_error_chains"] = float(error)
    return summary


def of_each_image(
    figures: dict[str, dict[str, Tensor]], distances: dict[str, Tensor], labels: Tensor
) -> list[dict[str, int | float]]:
    """Return the label of each image, its figures, means over its chains, and its distances."""
    return [
        {"label": int(label)}
        | {
            f"{posterior}_{name}": float(values[index].mean())
            for posterior, named in figures.items()
            for name, values in named.items()
        }
        | {f"{name}_distance": float(values[index]) for name, values in distances.items()}
        for index, label in enumerate(labels)
    ]


def print_table(summary: dict[str, Any], output: Path) -> None:
    """Print the figures as a short table, and where the files are."""
    table = Table(title=f"{summary['num_images']} test images, {summary['dataset']}")
    shown = [name for name in NAMES if f"{name}_classes" in summary]
    for column in ("", *(NAMES[name] for name in shown)):
        table.add_column(column, justify="right" if column else "left")
    labels = {"classes": "classes visited", "effective_classes": "  their effective number"}
    labels["switches"] = "switches per 100 sweeps"
    for prefix, title in (("", ""), ("drawn_", ", drawn pixels")):
        for key, label in labels.items():
            table.add_row(
                label + title, *(with_error(summary, f"{name}_{prefix}{key}") for name in shown)
            )
    table.add_row(
        "class frequencies, off by", *(with_error(summary, f"{name}_distance") for name in shown)
    )
    console = Console()
    console.print(table)
    console.print(
        "posterior: as many draws of p(z | given pixels) by HMC. Off by: total variation from "
        "those, after a fifth of the sweeps; one half of them from the other\n"
        f"± one standard error over images; classifier: {summary['classifier_accuracy']:.1%} of "
        f"the test images right; {summary['gradient_evaluations']:.3g} gradients, "
        f"{summary['reference_gradient_evaluations']:.3g} of the posterior",
        highlight=False,
    )
    console.print(f"  {output}\n  {output.with_suffix('.json')}", highlight=False, soft_wrap=True)


def with_error(summary: dict[str, Any], name: str) -> str:
    """Return a figure with its standard error, to two decimals; nothing where there is none."""
    if name not in summary:
        return ""
    return f"{summary[name]:.2f} ± {summary[f'{name}_standard_error']:.2f}"
