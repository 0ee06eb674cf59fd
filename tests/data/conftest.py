"""Small data sets in IDX files, whose images carry their index so that batches can be traced."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

CODE_BITS = 10


def idx_bytes(array: np.ndarray) -> bytes:
    """Return unsigned bytes in the IDX format."""
    magic = 0x0800 | array.ndim
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def coded_images(count: int, seed: int) -> np.ndarray:
    """Return random images whose first pixels are the binary digits of the index, 0 or 255.

    Binarization, fixed or dynamic, leaves these pixels as they are.
    """
    images = np.random.default_rng(seed).integers(0, 256, (count, 784), dtype=np.uint8)
    bits = np.arange(count)[:, None] >> np.arange(CODE_BITS) & 1
    images[:, :CODE_BITS] = 255 * bits
    return images.reshape(count, 28, 28)


def write_data_set(folder: Path, train: int, test: int, compress: bool) -> None:
    """Write the four files of a data set with ten classes."""
    folder.mkdir(parents=True)
    for prefix, count, seed in (("train", train, 0), ("t10k", test, 1)):
        arrays = {
            f"{prefix}-images-idx3-ubyte": coded_images(count, seed),
            f"{prefix}-labels-idx1-ubyte": (np.arange(count) % 10).astype(np.uint8),
        }
        for name, array in arrays.items():
            content = idx_bytes(array)
            path = folder / (f"{name}.gz" if compress else name)
            path.write_bytes(gzip.compress(content) if compress else content)


MakeRoot = Callable[..., Path]


@pytest.fixture
def make_root(tmp_path: Path) -> MakeRoot:
    """Return a function that writes a data set and returns its root folder."""

    def make(train: int = 60, test: int = 20, compress: bool = True, folder: str = "MNIST") -> Path:
        root = tmp_path / "root"
        write_data_set(root / folder / "raw", train, test, compress)
        return root

    return make


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torchvision's downloads fail as they do without a network."""

    def fail(self: datasets.MNIST) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nno network\n")

    monkeypatch.setattr(datasets.MNIST, "download", fail)
