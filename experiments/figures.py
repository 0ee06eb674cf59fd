"""The pictures that the commands write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torchvision.utils import make_grid

from data import ImageShape

MaskName = Literal["top", "bottom", "left", "right", "random"]

_SHOWN_SWEEPS = 12


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
