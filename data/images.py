"""A data set in memory, and what can be wrong with one."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from data.splits import stratified_order

FEWEST_IMAGES = 10
"""So that a tenth of the images can be for testing, and a tenth of the rest for validation."""


LAYOUT = "images are (N, H, W) or (N, C, H, W) with 1 or 3 channels"


class DataError(ValueError):
    """The data or the arguments that select them cannot be used: one line says what to do."""


class DataUnavailable(DataError):  # noqa: N818 (it is one of the DataErrors)
    """No file of the data set is there, and it cannot be downloaded."""


ImageShape = tuple[int, int, int]
"""Channels, height and width."""

MNIST_SHAPE: ImageShape = (1, 28, 28)
"""Of all data sets that have a name here."""


class ImageSplits(NamedTuple):
    """A data set in memory; images are rows, the pixels of a channel side by side."""

    name: str
    """The data set: its name, or where it was read from."""
    train_images: Tensor
    """(N, C · H · W), uint8 grey levels from 0 to 255, or floating-point numbers."""
    train_labels: Tensor
    """(N,), int64; all zero where the classes are not known."""
    test_images: Tensor
    """(M, C · H · W)."""
    test_labels: Tensor
    """(M,), int64."""
    image_shape: ImageShape = MNIST_SHAPE
    """(C, H, W)."""


def grey_levels(images: Tensor) -> Tensor:
    """Return uint8 levels from 0 to 255 as numbers from 0 to 1; other numbers as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def digest(splits: ImageSplits) -> str:
    """Return a digest of all images, by which one sees whether they are still the same."""
    found = hashlib.sha256()
    for images in (splits.train_images, splits.test_images):
        found.update(images.contiguous().numpy().data)
    return found.hexdigest()


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
    return assemble(name, *parts)


def check_levels(splits: ImageSplits) -> None:
    """Raise DataError where pixels cannot be drawn with their grey levels as probabilities."""
    for images in (splits.train_images, splits.test_images):
        low, high = map(float, images.aminmax())
        if images.is_floating_point() and (low < 0 or high > 1):
            raise DataError(
                f"{splits.name}: binarized pixels need grey levels from 0 to 1, got {low:.4g} to "
                f"{high:.4g}; scale them, or do not binarize"
            )


def assemble(
    name: str,
    images: Tensor,
    labels: Tensor,
    test_images: Tensor | None = None,
    test_labels: Tensor | None = None,
) -> ImageSplits:
    """Return a data set of checked images (N, C, H, W) and labels (N,)."""
    if len(images) < FEWEST_IMAGES:
        raise DataError(f"{name}: {len(images)} images are too few, use {FEWEST_IMAGES} or more")
    if test_images is None or test_labels is None:
        order = stratified_order(labels)
        train, test = order[: -(len(order) // 10)], order[-(len(order) // 10) :]
        images, test_images = images[train], images[test]
        labels, test_labels = labels[train], labels[test]
    if test_images.shape[1:] != images.shape[1:] or test_images.dtype != images.dtype:
        raise DataError(
            f"{name}: test images are {described(test_images)}, those for training "
            f"{described(images)}; give both the same size and type"
        )
    shape: ImageShape = tuple(images.shape[1:])  # type: ignore[assignment]
    return ImageSplits(name, images.flatten(1), labels, test_images.flatten(1), test_labels, shape)


def _checked(name: str, images: Tensor) -> Tensor:
    """Return images as (N, C, H, W), uint8 or float32."""
    if images.dim() == 3:
        images = images[:, None]
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise DataError(f"{name}: {LAYOUT}, got {tuple(images.shape)}")
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


def described(images: Tensor) -> str:
    """Return the size and type of images (N, C, H, W), in words."""
    return f"{' x '.join(map(str, images.shape[1:]))} {str(images.dtype).removeprefix('torch.')}"
