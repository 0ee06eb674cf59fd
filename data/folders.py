"""Images of the user's own, in one file or in a folder of image files."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.files import read_image, read_tensor
from data.images import DataError, ImageSplits, assemble, described, splits_of_tensors


def read_own(path: Path) -> ImageSplits:
    """Read a data set from a .pt or .npy file or from a folder.

    A file holds one tensor or array, as in :func:`splits_of_tensors`. A folder holds image files of
    one size, in subfolders that name their classes or without; if it has the subfolders ``train``
    and ``test``, these hold them. Where no test images are named, a tenth of all are: a fixed
    choice, in which the classes have their overall proportions.

    Raises:
        DataError: The file or folder is missing, cannot be read, or holds something else.
    """
    name = str(path.resolve())
    if path.is_file():
        return splits_of_tensors(name, read_tensor(path))
    train, test = path / "train", path / "test"
    if not (train.is_dir() and test.is_dir()):
        return assemble(name, *_read_folder(path))
    classes = sorted({each.name for part in (train, test) for each in part.iterdir()})
    return assemble(name, *_read_folder(train, classes), *_read_folder(test, classes))


def _read_folder(folder: Path, classes: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Return the images of a folder, (N, C, H, W) uint8, and their labels, (N,)."""
    suffixes = {*IMG_EXTENSIONS}
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if not files:
        raise DataError(f"{folder} holds no image files ({', '.join(IMG_EXTENSIONS)})")
    parents = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in files]
    known = sorted(set(parents)) if classes is None else ["", *classes]
    first, images = None, []
    for path in files:
        image = read_image(path)
        first = image if first is None else first
        if image.shape != first.shape:
            raise DataError(
                f"{path} is {described(image[None])}, {files[0]} is {described(first[None])}; "
                "give all images one size and either grey levels or colours"
            )
        images.append(image)
    return torch.stack(images), torch.tensor([known.index(parent) for parent in parents])
