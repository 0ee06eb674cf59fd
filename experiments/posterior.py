"""Show the posterior of one image: long chains of the kernel, and of HMC for the same gradients.

Chains that were interrupted go on where they were when the same command is started again.

How far it is from a Gaussian, and so from q(z|x): skewness and excess kurtosis along its
first principal axis. All standard errors come from the spread between the chains, which are
independent of each other, however slowly each of them mixes.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dglm import DGLM, FittedStart, long_chains, principal_axes
from dglm.annealing import check_counts
from dglm.importance import mean_and_error
from dglm.posterior import ChainMeans, Estimate, LongChains, PrincipalAxes
from dglm.precision import full_precision
from dglm.starts import starting_points
from experiments.shared.checkpoints import load_checkpoint
from experiments.shared.cli import (
    CommandError,
    choose_device,
    command_options,
    counted,
    run_command,
    stopped_between,
)
from experiments.shared.models import kernel_name
from experiments.shared.pictures import draw_posterior
from experiments.shared.runs import (
    output_file,
    partial_file,
    write_json,
)
from experiments.shared.scoring import PictureOptions, held_out
from samplers import HMC, Kernel, adapt, sample, seeded_generator, summarise
from samplers.adaptation import Moments
from samplers.hmc import JITTER

_NAMES = {"kernel": "the model's kernel", "hmc": "HMC, step size adapted"}
SEARCH_CHAINS, SEARCH_STEPS = 16, 400
_IMAGES_AT_ONCE = 100
_SEARCH_ERRORS = 5
_FIT_LEAPFROGS = 5


@dataclass(frozen=True, kw_only=True)
class Posterior(PictureOptions):
    """Which posterior is looked at, and for how long.

    Args:
        image: Which test image, from 0.
        search: Take, in place of ``image``, the most surely skewed posterior among so many test
            images, the first ones; the figures tell how many were searched and how many skewed.
        num_chains: Chains, started at q(z|x).
        num_steps: Metropolis-Hastings steps of each chain.
        num_warmup: Steps before those. Principal axes are those of the second half of them; HMC
            adapts its step size to an acceptance of 0.65 in as many more, then keeps it.
        num_leapfrogs: Leapfrogs of HMC; as many as the kernel's if null. HMC takes as many steps as
            cost it the kernel's gradients.
    """

    image: int = 0
    search: int | None = None
    num_chains: int = 512
    num_steps: int = 20_000
    num_warmup: int = 1000
    num_leapfrogs: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where a number is too small."""
        super().__post_init__()
        least = {"image": 0, "num_chains": 10, "num_steps": 4, "num_warmup": 20}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if self.num_leapfrogs is not None:
            check_counts(num_leapfrogs=self.num_leapfrogs)
        if self.search is not None:
            check_counts(search=self.search)
            if self.image != 0:
                raise ValueError("search chooses the image itself: leave one of the two out")


class Sampled(NamedTuple):
    """What a kernel has drawn."""

    kernel: Kernel
    num_steps: int
    chains: LongChains


def main(arguments: list[str] | None = None) -> None:
    """Sample, as the arguments say; by default those of the command line."""
    run(command_options("posterior", __doc__, Posterior, arguments))


def run(options: Posterior) -> None:
    """Run the chains, write the picture and the figures, and print them."""
    dglm, trained = load_checkpoint(options.checkpoint)
    if dglm.model.latent_dim < 2:
        raise CommandError(f"{options.checkpoint} has one latent variable; a plane needs two")
    with output_file(options.output, options.checkpoint, "posterior", ".png", ".json") as output:
        run_into(output, options, dglm, trained)


def run_into(output: Path, options: Posterior, dglm: DGLM, trained: dict[str, Any]) -> None:
    """Run the chains, write the picture into the output and the figures beside it."""
    data = held_out(options.data, trained)
    images = data.heldout("test")
    for name, count in (("image", options.image + 1), ("search", options.search or 0)):
        if count > len(images):
            raise CommandError(
                f"--{name} {getattr(options, name)}: {data.dataset_name} has {len(images)} "
                "test images"
            )
    dglm = dglm.to(choose_device(options.accelerator))
    index, searched = chosen_image(dglm, images, options)
    image = images[index].to(next(dglm.parameters()))
    axes, found = run_chains(dglm, image, options, output)
    warn_of_missed_modes(dglm, image, options.seed)
    with torch.no_grad():
        q = dglm.posterior(image[None])
    summary: dict[str, Any] = {
        "checkpoint": options.checkpoint,
        "kernel": kernel_name(dglm),
        "dataset": data.dataset_name,
        "split": "test",
        "num_images": 1,
        "image": index,
        "label": int(data.labels("test")[index]),
        **searched,
        "binarization": data.binarization,
        "seed": options.seed,
        "num_chains": options.num_chains,
        "num_warmup": options.num_warmup,
    }
    for name, sampled in found.items():
        summary |= {f"{name}_{key}": value for key, value in figures(sampled).items()}
    shown = {_NAMES[name]: sampled.chains for name, sampled in found.items()}
    picture = partial_file(output, "picture.png")
    draw_posterior(picture, image, data.image_shape, axes, shown, q)
    write_json(summary, output.with_suffix(".json"))
    picture.replace(output)
    print_table(summary, output)


@full_precision()
@torch.no_grad()
def warn_of_missed_modes(dglm: DGLM, image: Tensor, seed: int) -> None:
    """Warn where q(z|x), at which the chains start, misses a mode of the posterior."""
    start = FittedStart(dglm.encoder)
    if starting_points(dglm.model, image[None], start, _FIT_LEAPFROGS, seed).missed_modes.any():
        warnings.warn(
            "the chains started at q(z|x), which misses a mode of this posterior that chains from "
            "the prior found: the figures are of what q covers",
            stacklevel=2,
        )


def chosen_image(
    dglm: DGLM, images: Tensor, options: Posterior
) -> tuple[int, dict[str, int | float]]:
    """Return which image is looked at, and what the search for it has found, if there was one."""
    if options.search is None:
        return options.image, {}
    with counted("search, images", options.search, options.quiet) as progress:
        some = images[: options.search].to(next(dglm.parameters()))
        found = search_skewed(dglm, some, options.seed, progress)
    return found.image, {
        "searched_images": options.search,
        "searched_skewed": found.num_skewed,
        "searched_absolute_skewness_median": float(found.skewness.abs().median()),
    }


def run_chains(
    dglm: DGLM, image: Tensor, options: Posterior, output: Path
) -> tuple[PrincipalAxes, dict[str, Sampled]]:
    """Return the principal axes of p(z|x), and what the kernel and HMC have drawn from it.

    Raises:
        CommandError: HMC's trajectories are too long for the gradients that it may take.
    """
    rows = image.expand(options.num_chains, -1)
    energy, device = dglm.model.energy(rows), image.device
    start = dglm.posterior_samples(
        rows, 0, seeded_generator(device, options.seed, "posterior.start")
    )
    kernels: dict[str, tuple[Kernel, Tensor]] = {}
    if dglm.kernel is not None:
        kernels["kernel"] = dglm.kernel, start
    longest = HMC().num_leapfrogs if dglm.kernel is None else dglm.kernel.num_leapfrogs
    leapfrogs = options.num_leapfrogs or longest
    if options.num_steps * longest < 4 * leapfrogs:
        raise CommandError(f"--num_leapfrogs {leapfrogs} leaves HMC fewer than 4 steps")
    generator = seeded_generator(device, options.seed, "posterior.adaptation")
    hmc = HMC(leapfrogs, jitter=JITTER).to(device)
    kernels["hmc"] = adapt(hmc, energy, start, options.num_warmup, generator=generator)
    steps = {
        name: options.num_steps * longest // kernel.num_leapfrogs
        for name, (kernel, _) in kernels.items()
    }
    total = sum(steps.values()) + len(steps) * options.num_warmup
    found: dict[str, Sampled] = {}
    axes = None
    with (
        counted("posterior, steps", total, options.quiet) as shown,
        stopped_between(shown) as progress,
    ):
        for name, (kernel, position) in kernels.items():
            with torch.no_grad():
                context = kernel.embed(rows)
            generator = seeded_generator(device, options.seed, f"posterior.{name}")
            own, position = principal_axes(
                kernel, energy, position, options.num_warmup, generator, context, progress
            )
            axes = axes or own  # the first kernel's, so that both are seen from one side
            chains = long_chains(
                kernel,
                energy,
                position,
                steps[name],
                axes,
                generator,
                context,
                progress,
                partial_file(output, f"{name}.pt"),
            )
            found[name] = Sampled(kernel, steps[name], chains)
    return cast(PrincipalAxes, axes), found


def figures(sampled: Sampled) -> dict[str, float]:
    """Return the shape that the draws have, and what they are worth."""
    kernel, num_steps, chains = sampled
    means = chains.means
    ess, ess_squares = (_worst(means.effective_sample_size(power)) for power in (1, 2))
    measured = {
        "skewness": means.skewness(),
        "excess_kurtosis": means.excess_kurtosis(),
        "ess": ess,
        "ess_squares": ess_squares,
        "ess_per_gradient": Estimate(*(part / chains.gradient_evaluations for part in ess)),
    }
    found: dict[str, float] = {}
    for name, estimate in measured.items():
        found[name], found[f"{name}_standard_error"] = map(float, estimate)
    found["acceptance"], found["acceptance_standard_error"] = mean_and_error(chains.acceptance)
    return found | {
        "divergence": float(chains.divergence.mean()),
        "r_hat": float(summarise(chains.draws).worst().r_hat),
        "num_steps": num_steps,
        "num_leapfrogs": kernel.num_leapfrogs,
        "step_size": float(kernel.step_size.detach()),
        "gradient_evaluations": chains.gradient_evaluations,
    }


def _worst(estimate: Estimate) -> Estimate:
    """Return the smallest over coordinates."""
    index = estimate.value.argmin()
    return Estimate(estimate.value[index], estimate.standard_error[index])


def print_table(summary: dict[str, Any], output: Path) -> None:
    """Print the figures as a short table, and where the files are."""
    table = Table(title=f"Test image {summary['image']} of {summary['dataset']}")
    shown = [name for name in _NAMES if f"{name}_ess" in summary]
    for column in ("", *(_NAMES[name] for name in shown)):
        table.add_column(column, justify="right" if column else "left")
    labels = {
        "skewness": "skewness",
        "excess_kurtosis": "excess kurtosis",
        "ess": "effective sample size, worst coordinate",
        "ess_squares": "  of squares",
        "ess_per_gradient": "  per gradient",
        "acceptance": "acceptance",
    }
    for key, label in labels.items():
        names = [f"{name}_{key}" for name in shown]
        cells = [f"{summary[n]:.3g} ± {summary[f'{n}_standard_error']:.1g}" for n in names]
        table.add_row(label, *cells)
    table.add_row("R̂, worst coordinate", *(f"{summary[f'{n}_r_hat']:.4f}" for n in shown))
    gradients = [f"{summary[f'{n}_gradient_evaluations']:.3g}" for n in shown]
    table.add_row("gradients", *gradients)
    console = Console()
    console.print(table)
    console.print(
        f"{summary['num_chains']} chains; ± one standard error, from the spread between chains",
        highlight=False,
    )
    console.print(f"  {output}\n  {output.with_suffix('.json')}", highlight=False, soft_wrap=True)


class Search(NamedTuple):
    """What the search has found: estimates from few draws, which long chains must confirm."""

    skewness: Tensor
    """Of each image's posterior along its first principal axis, (image,)."""
    standard_error: Tensor
    """From the spread between 16 chains, (image,)."""

    @property
    def image(self) -> int:
        """The image whose skewness is surest not to be zero."""
        return int((self.skewness / self.standard_error).abs().argmax())

    @property
    def num_skewed(self) -> int:
        """How many images are skewed by more than five standard errors."""
        return int((self.skewness.abs() > _SEARCH_ERRORS * self.standard_error).sum())


@torch.no_grad()
def search_skewed(
    dglm: DGLM, images: Tensor, seed: int, progress: Callable[[int], object]
) -> Search:
    """Estimate the skewness of each image's posterior by 16 chains of 400 steps of HMC.

    Axes come from the first half of the draws, skewness from the second half.

    Arguments:
        dglm: The model; its kernel plays no part.
        images: Observations, (B, N).
        seed: Of all randomness.
        progress: Called with the number of images searched since the last call.
    """
    found = []
    for part, some in enumerate(images.split(_IMAGES_AT_ONCE)):
        generator = seeded_generator(images.device, seed, "posterior.search", part)
        rows = some.repeat_interleave(SEARCH_CHAINS, dim=0)
        energy = dglm.model.energy(rows)
        start = dglm.posterior_samples(rows, 0, generator)
        kernel, start = adapt(
            HMC(jitter=JITTER).to(rows.device), energy, start, SEARCH_STEPS, generator=generator
        )
        draws = sample(kernel, energy, start, SEARCH_STEPS, generator=generator).draws
        for chains in draws.view(len(some), SEARCH_CHAINS, SEARCH_STEPS, -1):
            axes = PrincipalAxes.of(Moments.of(chains[:, : SEARCH_STEPS // 2].flatten(0, 1)))
            found.append(ChainMeans.of(axes, chains[:, SEARCH_STEPS // 2 :]).skewness())
        progress(len(some))
    skewness, error = zip(*found, strict=True)
    return Search(torch.stack(skewness), torch.stack(error))


if __name__ == "__main__":
    run_command(main)
