"""The pictures that the commands write."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torchvision.utils import make_grid

_SIDE = 28


def save_samples(path: Path, images: Tensor, title: str) -> None:
    """Write a square grid of images (N, 784)."""
    columns = int(len(images) ** 0.5)
    figure, axes = plt.subplots(figsize=(6, 6.3), layout="constrained")
    _show(axes, images, columns)
    axes.set_title(title, fontsize=10)
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


def top_half_hidden(columns: int = _SIDE) -> Tensor:
    """Return the mask of given pixels, (784,), boolean, that hides the upper half."""
    given = torch.ones(_SIDE, columns, dtype=torch.bool)
    given[: _SIDE // 2] = False
    return given.flatten()
