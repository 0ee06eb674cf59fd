"""A data set in memory: its splits, and what pixels mean."""

import hashlib
import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.splits import stratified_order

Split = Literal["train", "validation", "test"]

ImageShape = tuple[int, int, int]
"""Channels, height and width."""

MNIST_SHAPE: ImageShape = (1, 28, 28)
"""Of all data sets that have a name here."""

FEWEST_IMAGES = 10
"""So that a tenth of the images can be for testing, and a tenth of the rest for validation."""

LAYOUT = "images are (N, H, W) or (N, C, H, W) with 1 or 3 channels"

_WHITES = (1, 255, 65535)
"""The white of integers, of one bit, eight or sixteen."""
_FAINTEST_WHITE = 1 / 15
"""Levels that end below this share of white, as of four bits in eight, have another white."""


class DataError(ValueError):
    """The data or the arguments that select them cannot be used: one line says what to do."""


class DataUnavailable(DataError):  # noqa: N818 (it is one of the DataErrors)
    """No file of the data set is there, and it cannot be downloaded."""


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
    num_validation: int | None = None
    """How many of the last training images are for validation; None leaves the choice open."""
    contents: str = ""
    """What was found in the files, in words."""


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
    name: str, train_images: Tensor | np.ndarray, test_images: Tensor | np.ndarray | None = None
) -> ImageSplits:
    """Return a data set of images in tensors or arrays, without classes.

    Arguments:
        name: What to call it.
        train_images: (N, H, W) or (N, C, H, W); see :func:`assemble` for what pixels mean.
        test_images: Likewise; without them a fixed tenth of the images is for testing.

    Raises:
        DataError: There are too few images, or they have the wrong shape, type or numbers.
    """
    parts: dict[Split, tuple[Tensor, Tensor]] = {}
    given: dict[Split, Tensor | np.ndarray | None] = {"train": train_images, "test": test_images}
    for split, images in given.items():
        if images is not None:
            tensor = _tensor(name, images)
            parts[split] = tensor, torch.zeros(tensor.shape[:1], dtype=torch.int64)
    return assemble(name, parts)


def assemble(
    name: str, parts: dict[Split, tuple[Tensor, Tensor]], contents: str = ""
) -> ImageSplits:
    """Return a data set of images, (N, H, W) or (N, C, H, W), and labels, (N,), of each split.

    Integers and booleans are grey levels: black is 0, and white is 1, 255 or 65535, the smallest
    that no level of the split exceeds. Floating-point numbers stay as they are. Where no test
    images are named, a tenth of those for training are: a fixed choice, in which the classes have
    their overall proportions.

    Raises:
        DataError: There are too few images, or they have the wrong shape, type or numbers.
    """
    checked = {split: _checked(name, each) for split, (each, _) in parts.items()}
    labels = {split: each for split, (_, each) in parts.items()}
    count = len(checked["train"])
    if count < FEWEST_IMAGES:
        raise DataError(f"{name}: {count} images are too few, use {FEWEST_IMAGES} or more")
    images = _levels(name, checked)
    train = images["train"]
    for split, each in images.items():
        if each.shape[1:] != train.shape[1:] or each.dtype != train.dtype:
            raise DataError(
                f"{name}: {split} images are {described(each)}, those for training "
                f"{described(train)}; give both the same size and type"
            )
    if "test" not in images:
        order = stratified_order(labels["train"])
        rows = order.split([len(order) - len(order) // 10, len(order) // 10])
        for found in (images, labels):
            found["train"], found["test"] = (found["train"][row] for row in rows)
    trained = [split for split in ("train", "validation") if split in images]
    return ImageSplits(
        name,
        torch.cat([images[split].flatten(1) for split in trained]),
        torch.cat([labels[split] for split in trained]),
        images["test"].flatten(1),
        labels["test"],
        (train.shape[1], train.shape[2], train.shape[3]),
        len(images["validation"]) if "validation" in images else None,
        contents,
    )


def check_levels(splits: ImageSplits) -> None:
    """Raise DataError where pixels cannot be drawn with their grey levels as probabilities."""
    if not splits.train_images.is_floating_point():
        return
    ranges = [images.aminmax() for images in (splits.train_images, splits.test_images)]
    low, high = min(float(each.min) for each in ranges), max(float(each.max) for each in ranges)
    if low < 0 or high > 1:
        raise DataError(
            f"{splits.name}: binarized pixels need grey levels from 0 to 1, got {low:.4g} to "
            f"{high:.4g}; scale them, or do not binarize"
        )
    _check_white(splits.name, high, 1)


def described(images: Tensor) -> str:
    """Return the size and type of images (N, C, H, W), in words."""
    return f"{' x '.join(map(str, images.shape[1:]))} {str(images.dtype).removeprefix('torch.')}"


def _tensor(name: str, images: Tensor | np.ndarray) -> Tensor:
    """Return a tensor, or what an array holds, on the CPU."""
    if isinstance(images, Tensor):
        return images.detach().cpu().to_dense()
    try:
        # A copy, since torch knows no other order of bytes and no negative strides.
        return torch.from_numpy(images.astype(images.dtype.newbyteorder("="), order="C"))
    except (AttributeError, TypeError) as error:
        kind = f"{type(images).__name__} {getattr(images, 'dtype', '')}".strip()
        raise DataError(f"{name}: {LAYOUT}, in one tensor or NumPy array, not a {kind}") from error


def _checked(name: str, images: Tensor) -> Tensor:
    """Return images as (N, C, H, W), integers or float32."""
    if images.dim() == 3:
        images = images[:, None]
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise DataError(f"{name}: {LAYOUT}, got {tuple(images.shape)}{_cure(images)}")
    if images.is_complex():
        raise DataError(f"{name}: pixels are real numbers, got {images.dtype}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        return images.long()  # torch computes little with the others
    broken = (~images.isfinite()).flatten(1).any(dim=1)
    if broken.any():
        raise DataError(
            f"{name}: {int(broken.sum())} of {len(images)} images hold NaN or infinite "
            f"numbers, the first is image {int(broken.nonzero()[0])}; remove or mend them"
        )
    return images.float()


def _cure(images: Tensor) -> str:
    """Return what to do about images of another layout, where that can be told."""
    if images.dim() == 4 and images.shape[3] in (1, 3):
        return "; put the channels first: images.transpose(0, 3, 1, 2), or permute for a tensor"
    if images.dim() == 2:
        side = math.isqrt(images.shape[1])
        square = f", as images.reshape(-1, {side}, {side})" if side**2 == images.shape[1] else ""
        return f"; give flat images their height and width{square}"
    return ""


def _levels(name: str, images: dict[Split, Tensor]) -> dict[Split, Tensor]:
    """Return integers as grey levels, uint8 from 0 to 255, or float32 from 0 to 1 of 16 bits."""
    integers = {split: each for split, each in images.items() if not each.is_floating_point()}
    if not integers:
        return images
    low = min(int(each.min()) for each in integers.values())
    highs = {split: int(each.max()) for split, each in integers.items()}
    high = max(highs.values())
    if low < 0 or high > _WHITES[-1]:
        raise DataError(
            f"{name}: integer pixels are from 0 to 255, or to 65535 of 16 bits, got {low} to "
            f"{high}; scale them, or give floating-point numbers"
        )
    whites = {
        split: next(white for white in _WHITES if each <= white) for split, each in highs.items()
    }
    if {255, 65535} <= {*whites.values()}:
        raise DataError(
            f"{name}: the brightest pixels are {highs}; give all images grey levels of 8 bits, or "
            "all of 16"
        )
    white = max(whites.values())
    _check_white(name, high, white)
    if 1 < high < white and all(
        bool(((each == 0) | (each == high)).all()) for each in integers.values()
    ):
        raise DataError(
            f"{name}: all pixels are 0 or {high} where white is {white}: divide them by {high} if "
            "they are black and white"
        )
    for split, each in integers.items():
        _check_one_white(name, each, highs[split])
    if white > 255:
        return images | {split: each / whites[split] for split, each in integers.items()}
    scaled = {split: each * (255 // whites[split]) for split, each in integers.items()}
    return images | {split: each.to(torch.uint8) for split, each in scaled.items()}


def _check_white(name: str, high: float, white: int) -> None:
    if 0 < high < _FAINTEST_WHITE * white:
        raise DataError(
            f"{name}: the brightest pixel is {high:.4g} where white is {white}, so that all images "
            f"would be nearly black; multiply them by {white} / {high:.4g}"
        )


def _check_one_white(name: str, images: Tensor, high: int) -> None:
    """Raise DataError where one half of the images are zeros and ones, as masks beside pictures."""
    brightest = images.flatten(1).amax(dim=1)
    ones = int((brightest == 1).sum())
    if high > 1 and ones > 1 and ones >= int((brightest > 1).sum()):
        raise DataError(
            f"{name}: {ones} images are zeros and ones, others have levels to {high}; give all the "
            "same white, or leave out what is no image"
        )
