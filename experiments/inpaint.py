"""Fill in hidden pixels by block Gibbs, with q(z|x) and with the kernel, and count what is visited.

Beside the picture: how many classes the chains visit, how often they switch, and how far the
frequencies of the classes are from those of p(z | given pixels), by a classifier. It is shown
p(x|z) itself in place of the hidden pixels, so that only a z that moves can change its mind. What
the drawn pixels look like is counted too, and says how much their noise would flatter.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from data import ImageDataModule
from dglm import DGLM, KernelSteps
from dglm.annealing import check_counts
from experiments.classes import (
    NAMES,
    InpaintingTask,
    class_distances,
    distances_and_errors,
    fill_in,
    means_and_errors,
    of_chains,
    of_each_image,
    posterior_classes,
    print_table,
    reference_gradients,
    train_classifier,
)
from experiments.shared.checkpoints import load_checkpoint
from experiments.shared.cli import (
    CommandError,
    choose_device,
    command_options,
    counted,
    run_command,
)
from experiments.shared.models import kernel_name
from experiments.shared.pictures import MaskName, given_pixels, save_inpainting
from experiments.shared.runs import output_file, partial_file, write_json
from experiments.shared.scoring import PictureOptions, check_error_bars, held_out
from samplers import seeded_generator

_SHOWN_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class Inpaint(PictureOptions):
    """What is filled in, of which images, by which model.

    Args:
        mask: What is hidden: one half of the image, or each pixel with probability one half.
        posterior: What draws z: the encoder's q(z|x) anew at each sweep, the kernel from the z of
            the sweep before, or both side by side.
        sweeps: Sweeps, each a draw of z and one of the hidden pixels.
        steps_per_sweep: Metropolis-Hastings steps in each; as many as in training if null.
        num_images: How many test images, the first ones.
        num_chains: Chains for each image.
    """

    mask: MaskName = "top"
    posterior: Literal["encoder", "kernel", "both"] = "both"
    sweeps: int = 100
    steps_per_sweep: int | None = None
    num_images: int = 20
    num_chains: int = 8

    def __post_init__(self) -> None:
        """Raise ValueError where a number is too small."""
        super().__post_init__()
        check_error_bars(self.num_images, self.num_chains)
        if self.sweeps < 2:
            raise ValueError(f"sweeps must be at least 2, got {self.sweeps}")
        if self.steps_per_sweep is not None:
            if self.posterior == "encoder":
                raise ValueError("steps_per_sweep is of the kernel, which posterior encoder is not")
            check_counts(steps_per_sweep=self.steps_per_sweep)


def main(arguments: list[str] | None = None) -> None:
    """Inpaint, as the arguments say; by default those of the command line."""
    run(command_options("inpaint", __doc__, Inpaint, arguments))


def run(options: Inpaint) -> None:
    """Fill in, count, write the picture and the figures, and print them."""
    loaded = load_checkpoint(options.checkpoint)
    with output_file(options.output, options.checkpoint, "inpainting", ".png", ".json") as output:
        run_into(output, options, *loaded)


def run_into(output: Path, options: Inpaint, dglm: DGLM, trained: dict[str, Any]) -> None:
    """Fill in, count, write the picture into the output and the figures beside it."""
    posteriors = chosen_posteriors(dglm, options)
    data = held_out(options.data, trained)
    if len(data.labels("train").unique()) < 2:
        raise CommandError(f"{data.dataset_name} has no classes, whose visits could be counted")
    dglm = dglm.to(choose_device(options.accelerator))
    images = data.heldout("test")[: options.num_images].to(next(dglm.parameters()))
    mask = given_pixels(
        options.mask, data.image_shape, seeded_generator("cpu", options.seed, "inpaint.mask")
    )
    given = mask.to(dglm.device)
    classifier = train_classifier(data, options.seed)
    hidden = InpaintingTask(
        dglm, images, given, classifier, options.num_chains, options.sweeps, options.seed
    )
    figures, classes, shown = {}, {}, {}
    total = options.sweeps * (len(posteriors) + 1)
    with counted("inpainting, sweeps", total, options.quiet) as progress:
        for name, posterior in posteriors.items():
            classes[name], frames = fill_in(hidden, posterior, progress)
            drawn = classifier.classify(frames)
            figures[name] = of_chains(hidden, classes[name]) | {
                f"drawn_{key}": value for key, value in of_chains(hidden, drawn).items()
            }
            shown[NAMES[name]] = frames[:, :: options.num_chains][:, :_SHOWN_IMAGES].clone()
        reference = posterior_classes(hidden, progress)
    distances = class_distances(hidden, classes, reference)
    if len(figures) == 2:
        kernel, q = figures["kernel"], figures["encoder"]
        figures["gain"] = {key: kernel[key] - q[key] for key in kernel}
        distances["gain"] = distances["kernel"] - distances["encoder"]
    figures["reference"] = of_chains(hidden, reference)
    del figures["reference"]["switches"]  # which no sweeps lie between
    summary = {
        **description(options, dglm, data, len(images)),
        "reference_gradient_evaluations": reference_gradients(hidden),
        "classifier_accuracy": classifier.accuracy,
        "classifier_accuracy_standard_error": classifier.standard_error,
        **means_and_errors(figures),
        **distances_and_errors(distances),
        "images": of_each_image(figures, distances, data.labels("test")[: len(images)]),
    }
    title = (
        "Each pixel hidden or not" if options.mask == "random" else f"{options.mask} half hidden"
    )
    picture = partial_file(output, "picture.png")
    save_inpainting(
        picture, images[:_SHOWN_IMAGES], given, shown, data.image_shape, title.capitalize()
    )
    write_json(summary, output.with_suffix(".json"))
    picture.replace(output)
    print_table(summary, output)


def chosen_posteriors(dglm: DGLM, options: Inpaint) -> dict[str, nn.Module | KernelSteps]:
    """Return what draws z, by name.

    Raises:
        CommandError: A kernel is asked for that the model does not have.
    """
    posteriors: dict[str, nn.Module | KernelSteps] = {}
    if options.posterior != "kernel":
        posteriors["encoder"] = dglm.encoder
    if options.posterior != "encoder":
        if dglm.kernel is None:
            raise CommandError(
                f"{options.checkpoint} is a VAE, which has no kernel: choose --posterior encoder"
            )
        steps = options.steps_per_sweep or dglm.num_mh_steps
        posteriors["kernel"] = KernelSteps(dglm.kernel, steps)
    return posteriors


def description(
    options: Inpaint, dglm: DGLM, data: ImageDataModule, num_images: int
) -> dict[str, Any]:
    """Return what was done, and the gradients of U that the kernel took."""
    steps = options.steps_per_sweep or dglm.num_mh_steps
    gradients = 0
    if dglm.kernel is not None and options.posterior != "encoder":
        per_draw = steps * dglm.kernel.num_leapfrogs + 1
        gradients = num_images * options.num_chains * options.sweeps * per_draw
    return {
        "checkpoint": options.checkpoint,
        "kernel": kernel_name(dglm),
        "dataset": data.dataset_name,
        "split": "test",
        "binarization": data.binarization,
        "training_images": len(data.labels("train")),
        "seed": options.seed,
        "mask": options.mask,
        "sweeps": options.sweeps,
        "steps_per_sweep": steps,
        "num_images": num_images,
        "num_chains": options.num_chains,
        "gradient_evaluations": gradients,
    }


if __name__ == "__main__":
    run_command(main)
