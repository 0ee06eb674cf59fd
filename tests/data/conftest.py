"""Small data sets in IDX files, whose images carry their index so that batches can be traced."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torchvision import datasets

from data import ImageDataModule

CODE_BITS = 10
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def coded_images(count: int, seed: int) -> np.ndarray:
    """Return random images whose first pixels are the binary digits of the index, 0 or 255.

    Binarization, fixed or dynamic, leaves these pixels as they are.
    """
    images = np.random.default_rng(seed).integers(0, 256, (count, 784), dtype=np.uint8)
    bits = np.arange(count)[:, None] >> np.arange(CODE_BITS) & 1
    images[:, :CODE_BITS] = 255 * bits
    return images.reshape(count, 28, 28)


def write_files(folder: Path, train: np.ndarray, test: np.ndarray, compress: bool) -> None:
    """Write images (N, 28, 28), and labels that count from 0 to 9, as four IDX files."""
    folder.mkdir(parents=True)
    labels = [(np.arange(len(images)) % 10).astype(np.uint8) for images in (train, test)]
    for name, array in zip(FILES, (train, labels[0], test, labels[1]), strict=True):
        header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
        content = header + array.tobytes()
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture(scope="session")
def write_idx() -> Callable[..., None]:
    return write_files


@pytest.fixture
def make_root(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes coded images and returns the root folder of the data set."""

    def make(train: int = 60, test: int = 20, compress: bool = True, folder: str = "MNIST") -> Path:
        images = coded_images(train, 0), coded_images(test, 1)
        write_files(tmp_path / "root" / folder / "raw", *images, compress)
        return tmp_path / "root"

    return make


def in_training(images: ImageDataModule, **trainer: Any) -> ImageDataModule:
    """Attach what a data module sees of a trainer in the middle of training."""
    cpu = SimpleNamespace(root_device=torch.device("cpu"))
    precision = SimpleNamespace(convert_input=lambda batch: batch)
    defaults = {"global_rank": 0, "world_size": 1, "global_step": 0, "training": True}
    defaults |= {"accumulate_grad_batches": 1, "fit_loop": Trainer(logger=False).fit_loop}
    attributes = {**defaults, "strategy": cpu, "precision_plugin": precision, **trainer}
    images.trainer = SimpleNamespace(**attributes)  # type: ignore[assignment]
    return images


@pytest.fixture(scope="session")
def attach() -> Callable[..., ImageDataModule]:
    return in_training


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torchvision's downloads fail as they do without a network."""

    def fail(self: datasets.MNIST) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nno network\n")

    monkeypatch.setattr(datasets.MNIST, "download", fail)
