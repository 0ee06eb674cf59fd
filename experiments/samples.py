"""Draw samples of several models side by side, all from the same latent variables."""

from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from data import MNIST_SHAPE
from dglm import DGLM
from dglm.annealing import check_counts
from experiments.shared.checkpoints import load_checkpoint
from experiments.shared.cli import CommandError, command_parser, parse_options, run_command
from experiments.shared.models import model_name
from experiments.shared.pictures import save_samples
from experiments.shared.runs import output_file
from samplers import seeded_generator


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is drawn, by which models.

    Args:
        checkpoints: Checkpoints of DGLMs with equally many latent variables.
        num_images: How many images of each.
        seed: Seed of the latent variables.
        output: The picture, a .png file; beside the first checkpoint's run by default.
    """

    checkpoints: list[str]
    num_images: int = 64
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where a number is too small."""
        check_counts(num_images=self.num_images)
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


def main(arguments: list[str] | None = None) -> None:
    """Draw, as the arguments say; by default those of the command line."""
    parser = command_parser("samples", __doc__)
    help_text = "Checkpoints of DGLMs with equally many latent variables."
    parser.add_argument("--checkpoints", nargs="+", type=str, required=True, help=help_text)
    run(parse_options(parser, Samples, arguments, frozenset({"checkpoints"})))


def run(options: Samples) -> None:
    """Draw p(x|z) of each model and write the picture."""
    loaded = [load_checkpoint(path) for path in options.checkpoints]
    sizes = {dglm.model.latent_dim for dglm, _ in loaded}
    if len(sizes) > 1:
        raise CommandError(
            f"the models have different numbers of latent variables, {sorted(sizes)}: "
            "they cannot share z"
        )
    shapes = {tuple(trained.get("image_shape", MNIST_SHAPE)) for _, trained in loaded}
    if len(shapes) > 1:
        raise CommandError(f"the models' images have different shapes, {sorted(shapes)}")
    generator = seeded_generator("cpu", options.seed, "samples")
    z = torch.randn(options.num_images, sizes.pop(), generator=generator)
    panels = [
        (f"{model_name(dglm)}, {trained['dataset_name']}\n{path}", expected(dglm, z))
        for path, (dglm, trained) in zip(options.checkpoints, loaded, strict=True)
    ]
    title = f"p(x|z), the same z from the prior, seed {options.seed}"
    with output_file(options.output, options.checkpoints[0], "samples", ".png") as output:
        save_samples(output, panels, shapes.pop(), title)
    Console().print(f"  {output}", highlight=False, soft_wrap=True)


@torch.no_grad()
def expected(dglm: DGLM, z: Tensor) -> Tensor:
    """Return the mean of p(x|z), (N, C · H · W)."""
    return dglm.model.likelihood.mean(dglm.model.decoder(z.to(next(dglm.parameters()))))


if __name__ == "__main__":
    run_command(main)
