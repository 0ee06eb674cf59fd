"""Images of the user's own: in tensors, in one file, or in a folder of image files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.errors import DataError
from data.images import ImageShape, ImageSplits
from data.splits import stratified_order

FEWEST_IMAGES = 10
"""So that a tenth of the images can be for testing, and a tenth of the rest for validation."""

_LAYOUT = "images are (N, H, W) or (N, C, H, W) with 1 or 3 channels"
_MODES = {"1": "L", "L": "L", "RGB": "RGB"}


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
        return splits_of_tensors(name, _read_tensor(path))
    train, test = path / "train", path / "test"
    if not (train.is_dir() and test.is_dir()):
        return _splits(name, *_read_folder(path))
    classes = sorted({each.name for part in (train, test) for each in part.iterdir()})
    return _splits(name, *_read_folder(train, classes), *_read_folder(test, classes))


def splits_of_tensors(
    name: str, train_images: Tensor, test_images: Tensor | None = None
) -> ImageSplits:
    """Return a data set of images in tensors, without classes.

    Arguments:
        name: What to call it.
        train_images: (N, H, W) or (N, C, H, W), uint8 from 0 to 255 or floating-point.
        test_images: Likewise; without them a fixed tenth of the images is for testing.

    Raises:
        DataError: There are too few images, or they have the wrong shape, type or numbers.
    """
    parts = []
    for images in (train_images, test_images):
        if images is not None:
            parts += [_checked(name, images), torch.zeros(len(images), dtype=torch.int64)]
    return _splits(name, *parts)


def check_levels(splits: ImageSplits) -> None:
    """Raise DataError where pixels cannot be drawn with their grey levels as probabilities."""
    for images in (splits.train_images, splits.test_images):
        low, high = map(float, images.aminmax())
        if images.is_floating_point() and (low < 0 or high > 1):
            raise DataError(
                f"{splits.name}: binarized pixels need grey levels from 0 to 1, got {low:.4g} to "
                f"{high:.4g}; scale them, or do not binarize"
            )


def _splits(
    name: str,
    images: Tensor,
    labels: Tensor,
    test_images: Tensor | None = None,
    test_labels: Tensor | None = None,
) -> ImageSplits:
    if len(images) < FEWEST_IMAGES:
        raise DataError(f"{name}: {len(images)} images are too few, use {FEWEST_IMAGES} or more")
    if test_images is None or test_labels is None:
        order = stratified_order(labels)
        train, test = order[: -(len(order) // 10)], order[-(len(order) // 10) :]
        images, test_images = images[train], images[test]
        labels, test_labels = labels[train], labels[test]
    if test_images.shape[1:] != images.shape[1:] or test_images.dtype != images.dtype:
        raise DataError(
            f"{name}: test images are {_described(test_images)}, those for training "
            f"{_described(images)}; give both the same size and type"
        )
    shape: ImageShape = tuple(images.shape[1:])  # type: ignore[assignment]
    return ImageSplits(name, images.flatten(1), labels, test_images.flatten(1), test_labels, shape)


def _checked(name: str, images: Tensor) -> Tensor:
    """Return images as (N, C, H, W), uint8 or float32."""
    if images.dim() == 3:
        images = images[:, None]
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise DataError(f"{name}: {_LAYOUT}, got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(
            f"{name}: pixels are uint8 from 0 to 255 or floating-point, got {images.dtype}"
        )
    if images.is_floating_point():
        broken = (~images.isfinite()).flatten(1).any(dim=1)
        if broken.any():
            raise DataError(
                f"{name}: {int(broken.sum())} of {len(images)} images hold NaN or infinite "
                f"numbers, the first is image {int(broken.nonzero()[0])}; remove or mend them"
            )
        images = images.float()
    return images.detach().cpu()


def _described(images: Tensor) -> str:
    return f"{' x '.join(map(str, images.shape[1:]))} {str(images.dtype).removeprefix('torch.')}"


def _read_tensor(path: Path) -> Tensor:
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # which one depends on what the damaged file looks like
        raise DataError(f"{path} cannot be read as a .pt or .npy file of one tensor") from error
    if not isinstance(content, Tensor):
        raise DataError(f"{path} holds a {type(content).__name__}, not one tensor; {_LAYOUT}")
    return content


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
        image = _read_image(path)
        first = image if first is None else first
        if image.shape != first.shape:
            raise DataError(
                f"{path} is {_described(image[None])}, {files[0]} is {_described(first[None])}; "
                "give all images one size and either grey levels or colours"
            )
        images.append(image)
    return torch.stack(images), torch.tensor([known.index(parent) for parent in parents])


def _read_image(path: Path) -> Tensor:
    """Return the pixels of an image file, (C, H, W), uint8."""
    try:
        with Image.open(path) as image:
            mode = _MODES.get(image.mode)
            pixels = None if mode is None else np.array(image.convert(mode))
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise DataError(f"{path} cannot be read as an image; replace or remove it") from error
    if pixels is None:
        raise DataError(f"{path} has pixels of type {image.mode}; convert it to grey or RGB")
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
