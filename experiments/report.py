"""What a trained model is worth: figures, pictures and a table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data import ImageDataModule, ImageShape
from dglm import DGLM, inpaint
from dglm.annealing import check_counts
from dglm.callbacks import (
    DIVERGENCE_BOUND,
    EXACTNESS_BOUND,
    divergence_warning,
    exactness_errors,
    exactness_warning,
    skipped_warning,
)
from dglm.chain import long_chain_log_joint
from dglm.importance import mean_and_error
from experiments.shared.models import kernel_name, model_name
from experiments.shared.pictures import given_pixels, save_inpainting, save_rows, save_samples
from experiments.shared.runs import print_files, write_json
from experiments.shared.scoring import (
    BATCH_SIZE,
    ScoringOptions,
    check_error_bars,
    score,
    score_summary,
)
from samplers import seeded_generator

_CHECKED_IMAGES = 100
_SHOWN_DIGITS = 3


@dataclass(frozen=True)
class Evaluation(ScoringOptions):
    """How the trained model is scored on test images and drawn.

    Args:
        num_images: Test images that are scored, the first ones.
        num_sweeps: Sweeps of the inpainting.
    """

    num_images: int = 100
    num_sweeps: int = 48

    def __post_init__(self) -> None:
        """Raise ValueError where a number is too small."""
        super().__post_init__()
        check_counts(num_sweeps=self.num_sweeps)
        check_error_bars(self.num_images, self.num_chains)


class Trained(NamedTuple):
    """A trained model, and what its training took."""

    dglm: DGLM
    trainer: Trainer
    """What the model is scored with."""
    updates: int
    images_each: int
    """Of one update."""


def report(
    trained: Trained, data: ImageDataModule, options: Evaluation, folder: Path, quiet: bool
) -> None:
    """Write summary.json and the pictures of a trained model into its run folder; print both."""
    dglm, trainer, updates, images_each = trained
    images = data.heldout("test")[: options.num_images]
    result = score(trainer, dglm, images, options, BATCH_SIZE, quiet)
    if not trainer.is_global_zero:
        return
    dglm = dglm.to(trainer.strategy.root_device).eval()
    images = images.to(next(dglm.parameters()))  # which --trainer.precision may have made float64
    summary = {
        "kernel": kernel_name(dglm),
        "seed": dglm.seed,
        "dataset": data.dataset_name,
        "training_images": len(data.labels("train")),
        "updates": updates,
        "training_gradient_evaluations": round(updates * images_each * dglm.gradients_per_update),
        **training_faults(dglm, images_each),
        "split": "test",
        "binarization": data.binarization,
        **score_summary(result, options),
        **posterior_figures(dglm, images[:_CHECKED_IMAGES]),
    }
    write_json(summary, folder / "summary.json")
    draw(dglm, images, data.image_shape, options.num_sweeps, folder)
    print_summary(f"{model_name(dglm)} on {data.dataset_name}, seed {dglm.seed}", summary, folder)


def training_faults(dglm: DGLM, images_each: int) -> dict[str, float]:
    """Sum up what training, of so many images an update, skipped, how often its chains diverged."""
    counts = dglm.safeguard
    faults: dict[str, float] = {"skipped_updates": counts.skipped}
    if dglm.kernel is not None:
        transitions = counts.updates * dglm.num_mh_steps * images_each
        faults["training_divergences"] = round(counts.divergence * transitions)
        faults["training_divergence"] = faults["training_divergences"] / max(transitions, 1)
    return faults


def posterior_figures(dglm: DGLM, images: Tensor) -> dict[str, float]:
    """Measure how far the kernel carries log p(x, z) from q's value toward a long chain's."""
    generator = seeded_generator(images.device, dglm.seed, "report.posterior")
    with torch.no_grad():
        q = dglm.posterior(images)
        z = q.sample(generator)
        log_joint_q = dglm.model.log_joint(images, z)
    bound, bound_error = mean_and_error(log_joint_q + q.entropy())
    figures = {"log_elbo": bound, "log_elbo_standard_error": bound_error}
    measured = {"log_joint_q": log_joint_q}
    if dglm.kernel is not None:
        with torch.no_grad():
            chain = dglm.chain(images, q, z, generator)
        measured["log_joint_kernel"] = chain.log_joint[-1]
        figures["kernel_acceptance"], figures["kernel_acceptance_standard_error"] = mean_and_error(
            chain.acceptance
        )
        figures["kernel_divergence"] = float(chain.diverging.mean())
        figures["kernel_step_size"] = float(dglm.kernel.step_size.detach())
        figures["kernel_round_trip_error"], figures["kernel_log_det_error"] = exactness_errors(
            dglm, images, 0
        ).tolist()
    measured["log_joint_long_chain"] = long_chain_log_joint(
        dglm.model, images, z, generator=generator
    )
    if "log_joint_kernel" in measured:
        measured["log_joint_gain"] = measured["log_joint_kernel"] - log_joint_q
    for name, values in measured.items():
        figures[name], figures[f"{name}_standard_error"] = mean_and_error(values)
    return figures


def draw(dglm: DGLM, images: Tensor, shape: ImageShape, sweeps: int, folder: Path) -> None:
    """Write samples.png, reconstructions.png and inpainting.png."""
    generator = seeded_generator(images.device, dglm.seed, "report.pictures")
    with torch.no_grad():
        z = dglm.model.sample(100, generator)[1]
        samples = dglm.model.likelihood.mean(dglm.model.decoder(z))
    save_samples(folder / "samples.png", [("", samples)], shape, "p(x|z), z from the prior")
    shown = images[:12]
    rows = {"test images": shown, "from q": dglm.reconstruct(shown, 0, generator)}
    if dglm.kernel is not None:
        rows["from the kernel"] = dglm.reconstruct(shown, None, generator)
    title = "Reconstructions: p(x|z), z a posterior draw"
    save_rows(folder / "reconstructions.png", rows, shape, title)
    path = folder / "inpainting.png"
    draw_inpainting(dglm, images[:_SHOWN_DIGITS], shape, sweeps, generator, path)


def draw_inpainting(
    dglm: DGLM,
    images: Tensor,
    shape: ImageShape,
    sweeps: int,
    generator: torch.Generator,
    path: Path,
) -> None:
    """Draw block-Gibbs sweeps over hidden upper halves, by q and by the kernel."""
    given = given_pixels("top", shape).to(images.device)
    with torch.no_grad():
        start = dglm.posterior(images).sample(generator)
    frames = {"q": inpaint(dglm.model, images, given, sweeps, dglm.encoder, generator=generator)}
    if dglm.kernel is not None:
        posterior = (dglm.kernel, dglm.num_mh_steps)
        frames["kernel"] = inpaint(dglm.model, images, given, sweeps, posterior, start, generator)
    save_inpainting(path, images, given, frames, shape, "Upper half hidden")


def print_summary(title: str, summary: dict[str, Any], folder: Path) -> None:
    """Print the results as a short table, and where the files are."""
    table = Table(title=title)
    for column, justify in (("", "left"), ("nats", "right"), ("standard error", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    labels = {
        "log_likelihood": "log p(x), annealed importance sampling",
        "log_elbo": "evidence lower bound",
        "log_joint_q": "log p(x, z), z from q",
        "log_joint_kernel": "log p(x, z), z from the kernel",
        "log_joint_gain": "  of which the kernel's gain, paired",
        "log_joint_long_chain": "log p(x, z), z from a long HMC chain",
    }
    for key, label in labels.items():
        if key in summary:
            error = "standard_error" if key == "log_likelihood" else f"{key}_standard_error"
            table.add_row(label, f"{summary[key]:.2f}", f"{summary[error]:.2f}")
    console = Console()
    console.print(table)
    if "kernel_acceptance" in summary:
        console.print(
            f"kernel: acceptance {summary['kernel_acceptance']:.2f}, "
            f"step size {summary['kernel_step_size']:.3f}; "
            f"diverged: {summary['training_divergence']:.2%} of the transitions in training, "
            f"{summary['kernel_divergence']:.2%} on test images",
            highlight=False,
        )
    for warning in warnings(summary):
        console.print(f"warning: {warning}", highlight=False)
    console.print(f"{summary['num_images']} test images of {summary['dataset']}", highlight=False)
    print_files(folder)


def warnings(summary: dict[str, Any]) -> list[str]:
    """Return what a reader of the results should know about their soundness."""
    found = []
    if summary["skipped_updates"]:
        found.append(skipped_warning(summary["skipped_updates"], summary["updates"]))
    if "kernel_acceptance" in summary:
        share = max(summary["training_divergence"], summary["kernel_divergence"])
        if share > DIVERGENCE_BOUND:
            found.append(divergence_warning(share))
        errors = summary["kernel_round_trip_error"], summary["kernel_log_det_error"]
        if not all(error <= EXACTNESS_BOUND for error in errors):  # NaN, too
            found.append(exactness_warning(*errors))
    return found
