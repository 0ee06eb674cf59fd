"""The pictures that the commands write."""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Literal, get_args

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torchvision.utils import make_grid

from data import ImageShape
from dglm import DiagonalGaussian
from dglm.posterior import EDGES, ChainMeans, LongChains, PrincipalAxes

MaskName = Literal["top", "bottom", "left", "right", "random"]
_SHOWN_SWEEPS = 12
_ELLIPSES = (1, 2)
_LINES = ("-", "--", ":")
"""Of the samplers in turn: where they agree, what lies below is seen between the dashes."""


def save_samples(
    path: Path, panels: Sequence[tuple[str, Tensor]], shape: ImageShape, title: str
) -> None:
    """Write square grids of images side by side, each a title and the images (N, C · H · W)."""
    count = len(panels)
    size = (max(6, 4 * count), 6.3 if count == 1 else 4.6)
    figure, axes = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False)
    for axis, (label, images) in zip(axes[0], panels, strict=True):
        show_grid(axis, images, shape, int(len(images) ** 0.5))
        axis.set_title(label, fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def save_rows(path: Path, rows: dict[str, Tensor], shape: ImageShape, title: str) -> None:
    """Write labelled rows of images, each (N, C · H · W)."""
    columns = max(len(row) for row in rows.values())
    size = (0.55 * columns + 1.6, 0.62 * len(rows) + 0.5)
    figure, axes = plt.subplots(len(rows), 1, figsize=size, layout="constrained", squeeze=False)
    for axis, (label, images) in zip(axes[:, 0], rows.items(), strict=True):
        show_grid(axis, images, shape, columns)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def save_inpainting(
    path: Path,
    images: Tensor,
    given: Tensor,
    frames: dict[str, Tensor],
    shape: ImageShape,
    title: str,
) -> None:
    """Write rows of sweeps over hidden pixels, those of the same image beneath each other.

    Arguments:
        path: The picture.
        images: The whole images, (N, C · H · W).
        given: True where a pixel is given, (C · H · W,).
        frames: For each posterior the images after each sweep, (sweeps, N, C · H · W).
        shape: (C, H, W).
        title: What is hidden.
    """
    sweeps = len(next(iter(frames.values())))
    chosen = torch.linspace(0, sweeps - 1, min(sweeps, _SHOWN_SWEEPS)).round().long()
    rows = {}
    for index, image in enumerate(images):
        masked = torch.where(given, image, 0.5)
        for name, chain in frames.items():
            shown = chain[chosen.to(chain.device), index]
            rows[f"image {index + 1}, {name}"] = torch.cat([image[None], masked[None], shown])
    listed = ", ".join(str(int(sweep) + 1) for sweep in chosen)
    save_rows(path, rows, shape, f"{title}: image, given pixels, sweeps {listed}")


def image_grid(images: Tensor, shape: ImageShape, columns: int) -> Tensor:
    """Return images (N, C · H · W) in rows of so many, as one image (3, height, width), 0 to 1.

    Ink is dark on light where there is one channel.
    """
    pictures = images.detach().cpu().float().clamp(0, 1).view(-1, *shape)
    if shape[0] == 1:
        pictures = 1 - pictures
    return make_grid(pictures, nrow=columns, padding=1, pad_value=0.5)


def show_grid(axes: Axes, images: Tensor, shape: ImageShape, columns: int) -> None:
    """Show images (N, C · H · W) in rows of so many."""
    grid = image_grid(images, shape, columns)
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _save(figure: plt.Figure, path: Path) -> None:
    # Layouts measure labels before images take their shape, and would cut long ones off.
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def given_pixels(
    hidden: MaskName, shape: ImageShape, generator: torch.Generator | None = None
) -> Tensor:
    """Return the mask of given pixels, (C · H · W,), boolean, the same for all channels.

    Arguments:
        hidden: Which half is hidden; "random" hides each pixel with probability one half.
        shape: (C, H, W).
        generator: Of the random mask; without one, torch's global generator.

    Raises:
        ValueError: There is no such half.
    """
    if hidden == "random":
        return (torch.rand(shape[1:], generator=generator) < 0.5).expand(shape).flatten()
    given = torch.ones(shape, dtype=torch.bool)
    _, height, width = shape
    halves = {
        "top": given[:, : height // 2],
        "bottom": given[:, height // 2 :],
        "left": given[..., : width // 2],
        "right": given[..., width // 2 :],
    }
    if hidden not in halves:
        raise ValueError(f"a mask is one of {', '.join(get_args(MaskName))}, got {hidden!r}")
    halves[hidden].fill_(False)
    return given.flatten()


def draw_posterior(
    path: Path,
    image: Tensor,
    shape: ImageShape,
    axes: PrincipalAxes,
    found: dict[str, LongChains],
    q: DiagonalGaussian,
) -> None:
    """Draw histograms of all samplers' draws, and the first one's draws in the plane.

    Arguments:
        path: The picture.
        image: Whose posterior it is, (C · H · W,).
        shape: (C, H, W).
        axes: Of the posterior; one posterior standard deviation is the unit.
        found: Draws, by the name of the sampler.
        q: q(z|x), one row.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    first = next(iter(found.values()))
    mean, covariance = _projected(axes, q)
    for (name, chains), style in zip(found.items(), cycle(_LINES), strict=False):
        _histogram(left, chains.means, style, name)
    centre = float(first.means.powers[:, 0].mean())
    spread = math.sqrt(float(first.means.powers[:, 1].mean()) - centre**2)
    _gaussian(left, centre, spread, "k--", "fitted Gaussian")
    _gaussian(left, float(mean[0]), float(covariance[0, 0].sqrt()), "r-", "q(z|x)")
    left.set(xlim=(-4.5, 4.5), xlabel="first principal axis", ylabel="density")
    left.legend(fontsize=8, loc="upper right")
    inset = left.inset_axes((0.02, 0.72, 0.18, 0.26))
    show_grid(inset, image[None], shape, 1)
    draws = axes.project(first.draws).flatten(0, 1)
    right.hist2d(*draws.T.numpy(), bins=90, range=[[-4.5, 4.5]] * 2, cmap="Blues")
    _ellipses(right, draws.mean(dim=0), draws.T.cov(), "k--", "fitted Gaussian")
    _ellipses(right, mean, covariance, "r-", "q(z|x)")
    right.set(xlabel="first principal axis", ylabel="second principal axis", aspect="equal")
    right.legend(
        fontsize=8, loc="upper right", title="1 and 2 standard deviations", title_fontsize=8
    )
    figure.suptitle("p(z|x); unit: one posterior standard deviation", fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _projected(axes: PrincipalAxes, q: DiagonalGaussian) -> tuple[Tensor, Tensor]:
    """Return q's mean (2,) and covariance (2, 2) in the plane."""
    towards = axes.directions / axes.scale[:, None]
    covariance = (towards * q.variance()[0].double().cpu()) @ towards.T
    return axes.project(q.mean[0].cpu()), covariance


def _histogram(axis: Axes, means: ChainMeans, style: str, name: str) -> None:
    """Draw the density, and a band of two standard errors to both sides."""
    width = EDGES[1] - EDGES[0]
    centres = (EDGES[1:] + EDGES[:-1]) / 2
    density = means.histogram.mean(dim=0) / width
    error = 2 * means.histogram.std(dim=0) / len(means.histogram) ** 0.5 / width
    (line,) = axis.plot(centres, density, style, linewidth=1.2, label=name)
    axis.fill_between(centres, density - error, density + error, color=line.get_color(), alpha=0.3)


def _gaussian(axis: Axes, mean: float, std: float, style: str, name: str) -> None:
    grid = torch.linspace(-4.5, 4.5, 300)
    density = torch.exp(-0.5 * ((grid - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    axis.plot(grid, density, style, linewidth=1, label=name)


def _ellipses(axis: Axes, mean: Tensor, covariance: Tensor, style: str, name: str) -> None:
    angle = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    shape = torch.linalg.cholesky(covariance) @ circle
    for radius in _ELLIPSES:
        label = name if radius == 1 else None
        axis.plot(*(mean[:, None] + radius * shape), style, linewidth=1, label=label)
