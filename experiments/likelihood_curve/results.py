"""The results of the curve: rows, paired differences between the kernels, tables and a picture."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt

from experiments.likelihood_curve.models import LikelihoodCurve, Model
from experiments.shared.runs import read_json
from experiments.shared.trainings import Split, across_seeds, paired

COMPARED = (("l2hmc", "hmc"), ("l2hmc", "none"), ("hmc", "none"))
"""Which kernels' scores are subtracted from which, image by image."""
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


def _paired(
    folder: Path, split: Split, steps: int, seed: int, better: str, worse: str
) -> tuple[float, float] | None:
    one, other = (
        folder / Model(kernel, 1 if kernel == "none" else steps, seed).name  # type: ignore[arg-type]
        for kernel in (better, worse)
    )
    return paired(one, other, split)


def markdown(rows: list[dict[str, Any]], paired: list[dict[str, Any]]) -> str:
    """Return the scores and the differences as tables."""
    lines = [
        "| kernel | MH steps | seed | split | log p(x), nats | gradients an update | updates "
        "| seconds of training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = "" if row["kernel"] == "none" else row["num_mh_steps"]
        score = f"{row['log_likelihood']:.2f} ± {row['standard_error']:.2f}"
        cells = [row["kernel"], steps, row["seed"], row["split"], score]
        cells += [row["gradients_per_update"], row["updates"], f"{row['training_seconds']:.0f}"]
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


def draw_curve(
    options: LikelihoodCurve, rows: list[dict[str, Any]], paired: list[dict[str, Any]], path: Path
) -> None:
    """Draw scores over steps and over time, the paper's, and gains of L2HMC; a row for each split.

    Means over seeds, ± a standard error over seeds, each seed as a dot; a gain of a single seed ±
    its standard error over images.
    """
    splits, steps = options.splits, sorted(set(options.num_mh_steps))
    figure, axes = plt.subplots(
        len(splits), 4, figsize=(14, 3.3 * len(splits)), layout="constrained", squeeze=False
    )
    for (ours, times, papers, gains), split in zip(axes, splits, strict=True):
        own = [row for row in rows if row["split"] == split]
        _draw_ours(ours, own, steps)
        _draw_times(times, own)
        ours.set_title(f"{split} images, trained here", fontsize=9)
        _draw_paper(papers, split)
        _draw_gains(gains, [row for row in paired if row["split"] == split], split)
        for axis in (ours, times, papers):
            axis.set_ylabel("log p(x), nats")
        for axis in (ours, papers, gains):
            axis.set_xlabel("MH steps, J")
        times.set_xlabel("seconds of training")
    for axis in axes[0]:
        if axis.get_legend_handles_labels()[0]:  # the paper has no validation images
            axis.legend(fontsize=8)
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


def _draw_times(axis: plt.Axes, rows: list[dict[str, Any]]) -> None:
    """Draw each model where its training ended, with its number of steps."""
    axis.set_title("equal time is what counts", fontsize=9)
    for kernel, label in _LABELS.items():
        own = [row for row in rows if row["kernel"] == kernel]
        places = [row["training_seconds"] for row in own]
        scores = [row["log_likelihood"] for row in own]
        axis.plot(places, scores, ".", color=_COLOURS[kernel], label=label if own else None)
        for row, place in zip(own, zip(places, scores, strict=True), strict=True):
            text = "" if kernel == "none" else f" J = {row['num_mh_steps']}"
            axis.annotate(text, place, fontsize=7)


def _error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _draw_paper(axis: plt.Axes, split: str) -> None:
    axis.set_title("the paper: 1024-1024 decoder, 300 epochs", fontsize=9)
    for kernel, values in _PAPER.get(split, {}).items():
        colour, label = _COLOURS[kernel], _LABELS[kernel]
        axis.plot(_PAPER_STEPS, values, "--", marker="o", markersize=3, color=colour, label=label)


def _draw_gains(axis: plt.Axes, paired: list[dict[str, Any]], split: str) -> None:
    axis.set_title("L2HMC-DGLM − HMC-DGLM, nats", fontsize=9)
    axis.axhline(0, color="0.7", linewidth=0.8)
    gains = [row for row in paired if (row["of"], row["minus"]) == ("l2hmc", "hmc")]
    errors = [row["standard_error"] or next(iter(row["seeds"].values()))[1] for row in gains]
    places, means = [row["num_mh_steps"] for row in gains], [row["difference"] for row in gains]
    axis.errorbar(places, means, yerr=errors, fmt="o-", capsize=3, color="black", label="here")
    for row in gains:
        seeds = [difference for difference, _ in row["seeds"].values()]
        axis.plot([row["num_mh_steps"]] * len(seeds), seeds, ".", color="black", alpha=0.4)
    if split in _PAPER:
        pairs = zip(_PAPER[split]["l2hmc"], _PAPER[split]["hmc"], strict=True)
        papers = [ours - theirs for ours, theirs in pairs]
        axis.plot(_PAPER_STEPS, papers, "--", marker="o", markersize=3, color="0.5", label="paper")
