"""The pictures that the commands write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torchvision.utils import make_grid

MaskName = Literal["top", "bottom", "left", "right", "random"]

_SIDE = 28
_SHOWN_SWEEPS = 12


def save_samples(path: Path, panels: Sequence[tuple[str, Tensor]], title: str) -> None:
    """Write square grids of images side by side, each a title and the images (N, 784)."""
    count = len(panels)
    size = (max(6, 4 * count), 6.3 if count == 1 else 4.6)
    figure, axes = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False)
    for axis, (label, images) in zip(axes[0], panels, strict=True):
        _show(axis, images, int(len(images) ** 0.5))
        axis.set_title(label, fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def save_rows(path: Path, rows: dict[str, Tensor], title: str) -> None:
    """Write labelled rows of images, each (N, 784)."""
    columns = max(len(row) for row in rows.values())
    size = (0.55 * columns + 1.6, 0.62 * len(rows) + 0.5)
    figure, axes = plt.subplots(len(rows), 1, figsize=size, layout="constrained", squeeze=False)
    for axis, (label, images) in zip(axes[:, 0], rows.items(), strict=True):
        _show(axis, images, columns)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def save_inpainting(
    path: Path, images: Tensor, given: Tensor, frames: dict[str, Tensor], title: str
) -> None:
    """Write rows of sweeps over hidden pixels, those of the same image beneath each other.

    Arguments:
        path: The picture.
        images: The whole images, (N, 784).
        given: True where a pixel is given, (784,).
        frames: For each posterior the images after each sweep, (sweeps, N, 784).
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
    save_rows(path, rows, f"{title}: image, given pixels, sweeps {listed}")


def _show(axes: plt.Axes, images: Tensor, columns: int) -> None:
    grid = make_grid(
        images.detach().cpu().view(-1, 1, _SIDE, _SIDE), nrow=columns, padding=1, pad_value=0.5
    )
    axes.imshow(grid[0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def given_pixels(hidden: MaskName, generator: torch.Generator | None = None) -> Tensor:
    """Return the mask of given pixels, (784,), boolean.

    Arguments:
        hidden: Which half is hidden; "random" hides each pixel with probability one half.
        generator: Of the random mask; without one, torch's global generator.

    Raises:
        ValueError: There is no such half.
    """
    if hidden == "random":
        return torch.rand(_SIDE**2, generator=generator) < 0.5
    half, given = _SIDE // 2, torch.ones(_SIDE, _SIDE, dtype=torch.bool)
    halves = {
        "top": given[:half],
        "bottom": given[half:],
        "left": given[:, :half],
        "right": given[:, half:],
    }
    if hidden not in halves:
        raise ValueError(f"a mask is one of {', '.join(get_args(MaskName))}, got {hidden!r}")
    halves[hidden].fill_(False)
    return given.flatten()
