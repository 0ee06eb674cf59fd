"""The classes of filled-in images: of the chains, of the posterior, and figures of both."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from data import ImageDataModule
from dglm import DGLM, KernelSteps, inpaint
from dglm.importance import mean_and_error
from samplers import HMC, adapt, sample, seeded_generator
from samplers.adaptation import warm_up_gradients
from samplers.hmc import JITTER

_REFERENCE_LEAPFROGS, _REFERENCE_WARM_UP, _REFERENCE_THIN = 10, 300, 5
NAMES = {
    "encoder": "q",
    "kernel": "kernel",
    "gain": "kernel − q",
    "reference": "posterior",
}
_BURN_IN = 0.2
"""Share of the sweeps that frequencies leave out: chains begin at the whole images."""


class Classifier(NamedTuple):
    """A classifier of binary images and its share of correct answers on test images."""

    network: Any
    """scikit-learn's MLPClassifier."""
    accuracy: float
    standard_error: float

    def classify(self, images: Tensor) -> Tensor:
        """Return the class of each image (…, D), (…,), on the CPU."""
        found = self.network.predict(images.flatten(0, -2).cpu().numpy())
        return torch.from_numpy(found).view(images.shape[:-1])


def train_classifier(data: ImageDataModule, seed: int) -> Classifier:
    """Train a network of one hidden layer on the binarized training images and their labels."""
    # Here, as it takes half a second and most commands need none of it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier((128,), early_stopping=True, n_iter_no_change=5, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the accuracy tells enough
        network.fit(data.heldout("train").numpy(), data.labels("train").numpy())
    untested = Classifier(network, torch.nan, torch.nan)
    right = untested.classify(data.heldout("test")) == data.labels("test")
    return Classifier(network, *mean_and_error(right))


class InpaintingTask(NamedTuple):
    """Images with hidden pixels, and how many chains fill each in."""

    dglm: DGLM
    images: Tensor
    """(N, D)."""
    given: Tensor
    """True where a pixel is given, boolean, (D,)."""
    classifier: Classifier
    num_chains: int
    sweeps: int
    seed: int

    @property
    def rows(self) -> Tensor:
        """The image of each chain, (N · chain, D), those of an image side by side."""
        return self.images.repeat_interleave(self.num_chains, dim=0)

    def classes(self, z: Tensor) -> Tensor:
        """Return the classes of the images with p(x|z) in place of their hidden pixels, (B,)."""
        mean = self.dglm.model.likelihood.mean(self.dglm.model.decoder(z))
        return self.classifier.classify(torch.where(self.given, self.rows, mean))


@torch.no_grad()
def fill_in(
    hidden: InpaintingTask, posterior: nn.Module | KernelSteps, progress: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    """Run block Gibbs from draws of q(z|x) of the whole images.

    Returns:
        The classes at each sweep, (sweeps, N · chain), and the images, (sweeps, N · chain, D).
    """
    generator = seeded_generator(hidden.images.device, hidden.seed, "inpaint.chains")
    rows, classes = hidden.rows, []
    start = hidden.dglm.posterior_samples(rows, 0, generator)

    def observe(x: Tensor, z: Tensor) -> None:
        classes.append(hidden.classes(z))
        progress(1)

    frames = inpaint(
        hidden.dglm.model,
        rows,
        hidden.given,
        hidden.sweeps,
        posterior,
        start,
        generator,
        observe,
    )
    return torch.stack(classes), frames


def reference_gradients(hidden: InpaintingTask) -> int:
    """Return the gradients of U that :func:`posterior_classes` takes."""
    warm_up = warm_up_gradients(_REFERENCE_WARM_UP, _REFERENCE_LEAPFROGS)
    draws = 1 + _REFERENCE_THIN * hidden.sweeps * _REFERENCE_LEAPFROGS
    return len(hidden.images) * hidden.num_chains * (warm_up + draws)


@torch.no_grad()
def posterior_classes(hidden: InpaintingTask, progress: Callable[[int], object]) -> Tensor:
    """Return the classes of draws of p(z | given pixels), (sweeps, N · chain).

    By tuned HMC from draws of the prior, the hidden pixels integrated out: nothing is shared with
    the chains that it is a reference for, and no filled-in pixels hold z where it is.
    """
    done = 0

    def count(draws: int) -> None:
        nonlocal done
        progress(draws - done)
        done = draws

    generator = seeded_generator(hidden.images.device, hidden.seed, "inpaint.reference")
    model = hidden.dglm.model
    energy = model.marginal(hidden.given).energy(hidden.rows[:, hidden.given])
    start = model.sample(len(hidden.rows), generator)[1]
    kernel = HMC(_REFERENCE_LEAPFROGS, jitter=JITTER).to(start)
    warm = adapt(kernel, energy, start, _REFERENCE_WARM_UP, generator=generator)
    chains = sample(
        warm.kernel,
        energy,
        warm.position,
        hidden.sweeps,
        thin=_REFERENCE_THIN,
        generator=generator,
        progress=count,
    )
    return torch.stack([hidden.classes(z.to(start)) for z in chains.draws.unbind(dim=1)])


def movement(classes: Tensor) -> dict[str, Tensor]:
    """Count how chains move among classes, from those at each sweep, (sweeps, chain).

    Returns:
        For each chain the number of distinct classes; their effective number, the exponential of
        the entropy of their frequencies, to which a rare mistake of the classifier adds little;
        and the switches from class to class per 100 sweeps. (chain,) each.

    Raises:
        ValueError: There is only one sweep.
    """
    if len(classes) < 2:
        raise ValueError(f"switches of class take at least 2 sweeps, got {len(classes)}")
    shares = torch.nn.functional.one_hot(classes).double().mean(dim=0)
    return {
        "classes": (shares > 0).sum(dim=-1).double(),
        "effective_classes": torch.special.entr(shares).sum(dim=-1).exp(),
        "switches": 100 * (classes.diff(dim=0) != 0).double().mean(dim=0),
    }


def class_frequencies(classes: Tensor, num_images: int, num_classes: int) -> Tensor:
    """Return how often each class occurs at (sweeps, image · chain), (image, class)."""
    found = torch.nn.functional.one_hot(classes, num_classes).double().mean(dim=0)
    return found.view(num_images, -1, num_classes).mean(dim=1)


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    """Return half the sum of the differences of frequencies (…, class), from 0 to 1, (…,)."""
    return 0.5 * (first - second).abs().sum(dim=-1)


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
    number = 1 + max(int(found.max()) for found in [reference, *classes.values()])
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
