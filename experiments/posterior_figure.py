"""The picture of a posterior: along its first principal axis, and in the plane of the first two."""

import math
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from data import ImageShape
from dglm import ChainMeans, DiagonalGaussian, LongChains, PrincipalAxes
from dglm.shape import EDGES
from experiments.figures import show_grid

_ELLIPSES = (1, 2)
_LINES = ("-", "--", ":")
"""Of the samplers in turn: where they agree, what lies below is seen between the dashes."""


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
