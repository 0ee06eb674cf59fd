"""A data set in memory."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

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
