"""The curve's picture, the paper's beside ours."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt

from experiments.likelihood_curve.options import LikelihoodCurve

_PAPER_STEPS = (1, 2, 5, 7)
_PAPER = {
    "train": {
        "none": (-82.87,) * 4,
        "hmc": (-84.69, -81.60, -81.51, -81.19),
        "l2hmc": (-84.28, -80.92, -80.90, -80.84),
    },
    "test": {
        "none": (-85.53,) * 4,
        "hmc": (-87.39, -84.35, -84.03, -83.75),
        "l2hmc": (-87.06, -83.75, -83.50, -83.23),
    },
}
"""Read off Figure 2 of Levy, Hoffman and Sohl-Dickstein (2018)."""
_LABELS = {"none": "VAE", "hmc": "HMC-DGLM", "l2hmc": "L2HMC-DGLM"}
_COLOURS = {"none": "0.4", "hmc": "tab:blue", "l2hmc": "tab:orange"}


def draw_curve(options: LikelihoodCurve, rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the means over seeds, ± a standard error over seeds, each seed as a dot."""
    splits, steps = options.splits, sorted(set(options.num_mh_steps))
    figure, axes = plt.subplots(
        2, len(splits), figsize=(4.2 * len(splits), 6), layout="constrained", squeeze=False
    )
    for column, split in enumerate(splits):
        _draw_ours(axes[0, column], [row for row in rows if row["split"] == split], steps)
        axes[0, column].set_title(f"{split}: here")
        _draw_paper(axes[1, column], split)
    for axis in axes.flat:
        axis.set_xlabel("MH steps")
        axis.set_ylabel("log p(x), nats")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_ours(axis: plt.Axes, rows: list[dict[str, Any]], all_steps: list[int]) -> None:
    for kernel, label in _LABELS.items():
        scores: dict[int, list[float]] = {}
        for row in rows:
            if row["kernel"] == kernel:
                shown = all_steps if kernel == "none" else [row["num_mh_steps"]]
                for steps in shown:
                    scores.setdefault(steps, []).append(row["log_likelihood"])
        if not scores:
            continue
        places = sorted(scores)
        errors = [_error(scores[steps]) for steps in places]
        means = [mean(scores[steps]) for steps in places]
        colour = _COLOURS[kernel]
        axis.errorbar(places, means, yerr=errors, color=colour, label=label, capsize=3, marker="_")
        for steps in places:
            axis.plot([steps] * len(scores[steps]), scores[steps], ".", color=colour, alpha=0.6)


def _error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _draw_paper(axis: plt.Axes, split: str) -> None:
    axis.set_title(f"{split}: the paper (1024-1024 decoder, 300 epochs)", fontsize=9)
    for kernel, values in _PAPER.get(split, {}).items():
        axis.plot(_PAPER_STEPS, values, "--", marker="o", markersize=3, color=_COLOURS[kernel])
