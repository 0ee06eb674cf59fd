"""The picture of a comparison: autocorrelations of x and of x²."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

_COLOURS = (
    *("#0072B2", "#D55E00", "#CC79A7", "#999999"),
    *("#000000", "#009E73", "#E69F00", "#56B4E9"),
)
"""Okabe and Ito's, which the colour-blind tell apart."""


def draw_autocorrelations(
    path: Path,
    target: str,
    correlations: dict[str, dict[str, Tensor]],
    rows: list[dict[str, Any]],
) -> None:
    """Draw ρ of x and of x² over the gradients that a lag costs."""
    figure, both = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axes, quantity in zip(both, ("x", "x²"), strict=True):
        for colour, row in zip(_COLOURS[: len(rows)], rows, strict=True):
            values = correlations[row["sampler"]][quantity]
            gradients = torch.arange(len(values)) * row["gradients_per_step"]
            axes.plot(gradients[1:], values[1:], color=colour, label=row["sampler"], linewidth=1.2)
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set(xscale="log", xlabel="gradient evaluations of a chain", ylim=(-1.05, 1.05))
        axes.set_xlim(1, 4000)
        axes.set_title(f"autocorrelation of {quantity}", fontsize=10)
    both[0].set_ylabel("ρ")
    both[1].legend(fontsize=8)
    figure.suptitle(target, fontsize=11)
    figure.savefig(path, dpi=90)
    plt.close(figure)
