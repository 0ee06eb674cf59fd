"""Estimate the held-out log-likelihood of a trained model by annealed importance sampling.

An evaluation that was interrupted goes on where it was when it is started again.
"""

import csv
import hashlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dglm import DGLM, AISResult, bidirectional_bounds, importance_weighted_bound
from dglm.ais import chain_gradients, gradient_evaluations
from dglm.annealing import check_counts
from dglm.importance import mean_and_error
from dglm.starts import named_start
from experiments.shared.checkpoints import load_checkpoint
from experiments.shared.cli import (
    CommandError,
    command_options,
    counted,
    refused_options,
    run_command,
)
from experiments.shared.runs import output_file, write_json
from experiments.shared.scoring import (
    DataOptions,
    KeepResults,
    ScoringOptions,
    check_error_bars,
    held_out,
    score,
    score_summary,
)


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """What computes, in Lightning's words.

    Args:
        accelerator: cpu, gpu or auto.
        devices: How many devices, or auto.
        strategy: auto, or ddp for several processes.
        num_nodes: How many machines.
    """

    accelerator: str = "auto"
    devices: int | str = "auto"
    strategy: str = "auto"
    num_nodes: int = 1


@dataclass(frozen=True, kw_only=True)
class Evaluate(ScoringOptions):
    """What is estimated, of which model.

    Args:
        checkpoint: Checkpoint of a DGLM, for example runs/mnist-001/checkpoints/last.ckpt.
        split: Which images are scored.
        num_images: How many of them, the first ones.
        curve: Several numbers of temperatures instead of one, for example 100,300,1000.
        bdmc: Also bound log p(x) from both sides on simulated images, with the same settings.
        bdmc_images: How many images are simulated for it.
        iwae_samples: Also compute the importance-weighted bound with so many samples.
        batch_size: Images at once; results of whole batches survive an interruption.
        output: Results, a .json file; beside the checkpoint's run by default. The scores of
            each image go into a .csv, the curve into a .png of the same name.
        quiet: Show no progress bars.
        data: Where the images come from.
        trainer: What computes.
    """

    checkpoint: str
    split: Literal["test", "validation", "train"] = "test"
    num_images: int = 1000
    curve: str | None = None
    bdmc: bool = False
    bdmc_images: int = 100
    iwae_samples: int = 0
    batch_size: int = 50
    output: str | None = None
    quiet: bool = False
    data: DataOptions = field(default_factory=DataOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)

    def __post_init__(self) -> None:
        """Raise ValueError where a number is too small."""
        super().__post_init__()
        check_error_bars(self.num_images, self.num_chains)
        check_counts(batch_size=self.batch_size)
        if self.iwae_samples < 0 or self.iwae_samples == 1:
            raise ValueError(f"iwae_samples must be 0 or at least 2, got {self.iwae_samples}")
        if self.bdmc:
            check_error_bars(self.bdmc_images, self.num_chains)
        elif self.bdmc_images != Evaluate.bdmc_images:
            raise ValueError("bdmc_images is of bdmc true: add that, or leave it out")
        self.points()
        if self.curve is not None and self.num_temperatures != Evaluate.num_temperatures:
            raise ValueError(
                "curve has its own numbers of temperatures: leave num_temperatures out"
            )

    def points(self) -> list["Evaluate"]:
        """Return the options of each point of the curve, the most temperatures last."""
        if self.curve is None:
            return [self]
        try:
            counts = sorted({int(text) for text in self.curve.split(",")})
        except ValueError as error:
            raise ValueError(
                f"curve takes numbers of temperatures like 100,300,1000, got {self.curve!r}"
            ) from error
        return [replace(self, num_temperatures=count, curve=None) for count in counts]


def main(arguments: list[str] | None = None) -> None:
    """Evaluate, as the arguments say; by default those of the command line."""
    evaluate(command_options("evaluate", __doc__, Evaluate, arguments))


def evaluate(options: Evaluate) -> None:
    """Estimate, write the results and print them; go on with what an interrupted command left."""
    loaded = load_checkpoint(options.checkpoint)
    suffixes = (".json", ".csv") if options.curve is None else (".json", ".csv", ".png")
    with output_file(options.output, options.checkpoint, "evaluation", *suffixes) as output:
        evaluate_into(output, options, *loaded)


def evaluate_into(output: Path, options: Evaluate, dglm: DGLM, trained: dict[str, Any]) -> None:
    """Estimate, write the results into the output and files beside it, and print them."""
    data = held_out(options.data, trained, options.split)
    images = data.heldout(options.split)[: options.num_images]
    with refused_options():
        named_start(options.start, dglm)  # which refuses what the model has not
        trainer = Trainer(**asdict(options.trainer), logger=False, enable_progress_bar=False)
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise CommandError(
            f"--trainer.strategy {options.trainer.strategy} would keep the results in processes of "
            "its own: choose ddp"
        )
    identity = {
        **asdict(options),
        "checkpoint": hashlib.sha256(Path(options.checkpoint).read_bytes()).hexdigest(),
        "data": hashlib.sha256(images.numpy().tobytes()).hexdigest(),
        "processes": trainer.world_size,
        "output": None,
        "quiet": None,
    }
    keep = KeepResults(output, trainer.global_rank, identity)
    trainer.callbacks.append(keep)  # type: ignore[attr-defined]
    points = []
    for point in options.points():
        dglm.test_results = keep.results(point)
        result = score(trainer, dglm, images, point, options.batch_size, options.quiet)
        points.append((point, result))
    if not trainer.is_global_zero:
        return
    bounds = other_bounds(dglm.to(trainer.strategy.root_device), images, point)
    summary: dict[str, Any] = {
        "checkpoint": options.checkpoint,
        "dataset": data.dataset_name,
        "split": options.split,
        "binarization": data.binarization,
        "seed": options.seed,
        **score_summary(result, point),
    }
    if options.curve is not None:
        summary["curve"] = [score_summary(result, point) for point, result in points]
        draw_curve(summary["curve"], output.with_suffix(".png"))
    write_scores(output.with_suffix(".csv"), result)
    write_json(summary | bounds, output)
    print_table(summary | bounds, output)


def other_bounds(dglm: DGLM, images: Tensor, options: Evaluate) -> dict[str, Any]:
    """Return the bounds on log p(x) that are asked for beside the estimate."""
    found: dict[str, Any] = {}
    if options.iwae_samples:
        found |= importance_summary(dglm, images.to(dglm.device), options)
    if options.bdmc:
        found |= bidirectional_summary(dglm, options)
    return found


def importance_summary(dglm: DGLM, images: Tensor, options: Evaluate) -> dict[str, Any]:
    """Compute the importance-weighted bound of the same images."""
    total = len(images) * options.iwae_samples
    with counted("importance weights", total, options.quiet) as progress:
        result = importance_weighted_bound(
            dglm.model, dglm.encoder, images, options.iwae_samples, options.seed, progress
        )
    bound, error = mean_and_error(result.log_likelihood)
    return {
        "iwae_bound": bound,
        "iwae_standard_error": error,
        "iwae_samples": options.iwae_samples,
        "iwae_effective_sample_size": float(result.effective_sample_size.mean()),
    }


def bidirectional_summary(dglm: DGLM, options: Evaluate) -> dict[str, Any]:
    """Bound log p(x) of simulated images from both sides."""
    start = named_start(options.start, dglm)
    total = gradient_evaluations(dglm.model, options.bdmc_images, options, start)
    total += options.bdmc_images * chain_gradients(options)
    with counted("bidirectional, gradients", total, options.quiet) as progress:
        bounds = bidirectional_bounds(
            dglm.model,
            options.bdmc_images,
            options.settings,
            start,
            progress,
        )
    lower, lower_error = mean_and_error(bounds.lower)
    upper, upper_error = mean_and_error(bounds.upper)
    return {
        "bdmc_lower": lower,
        "bdmc_lower_standard_error": lower_error,
        "bdmc_upper": upper,
        "bdmc_upper_standard_error": upper_error,
        "bdmc_gap": bounds.gap,
        "bdmc_gap_standard_error": bounds.gap_standard_error,
        "bdmc_images": options.bdmc_images,
        "bdmc_gradient_evaluations": bounds.gradient_evaluations,
    }


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


if __name__ == "__main__":
    run_command(main)
