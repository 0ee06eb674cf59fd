"""Files of images: IDX, the format of MNIST and its relatives; one tensor; a picture.

torchvision's reader of IDX files decompresses beside the file, which fails in a read-only folder,
and reports a damaged file as a bare assertion.
"""

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.images import LAYOUT, DataError

IMAGE_SIDE = 28
IMAGE_MAGIC = 0x00000803
LABEL_MAGIC = 0x00000801
GZIP_MAGIC = b"\x1f\x8b"

_CONTENTS = {IMAGE_MAGIC: "images", LABEL_MAGIC: "labels"}
_MODES = {"1": "L", "L": "L", "RGB": "RGB"}
_REMEDY = "replace it by a sound copy, or delete it to have it downloaded again"


def find_idx(folder: Path, name: str) -> Path | None:
    """Return the path of the IDX file ``name`` in ``folder``, plain or ``.gz``, or None."""
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if os.path.isfile(path)), None)


def read_images(path: Path) -> Tensor:
    """Read an IDX file of 28 x 28 images.

    Returns:
        The images, (N, 784), uint8.

    Raises:
        DataError: The file cannot be read, is damaged, or holds something else.
    """
    images = _read(path, IMAGE_MAGIC)
    _, rows, columns = images.shape
    if (rows, columns) != (IMAGE_SIDE, IMAGE_SIDE):
        raise DataError(
            f"{path}: its images are {rows} x {columns}, not {IMAGE_SIDE} x {IMAGE_SIDE}; "
            "put a data set of that size there"
        )
    return torch.from_numpy(images.reshape(len(images), -1))


def read_labels(path: Path) -> Tensor:
    """Read an IDX file of labels.

    Returns:
        The labels, (N,), int64.

    Raises:
        DataError: The file cannot be read, is damaged, or holds something else.
    """
    return torch.from_numpy(_read(path, LABEL_MAGIC)).long()


def _read(path: Path, magic: int) -> np.ndarray:
    """Return the array of unsigned bytes that an IDX file with this magic number holds."""
    content = _content(path)
    dimensions = magic & 0xFF
    start = 4 * (1 + dimensions)
    _check_magic(path, content, magic)
    if len(content) < start:
        raise DataError(f"{path} is truncated inside its header; {_REMEDY}")
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4)]
    expected = start + math.prod(shape)
    if len(content) != expected:
        trouble = "truncated" if len(content) < expected else "too long"
        raise DataError(
            f"{path} is {trouble} ({len(content)} bytes, its header says {expected}); {_REMEDY}"
        )
    if shape[0] == 0:
        raise DataError(f"{path} holds no {_CONTENTS[magic]}; {_REMEDY}")
    # A copy, because torch wants memory that may be written to.
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _check_magic(path: Path, content: bytes, magic: int) -> None:
    if not content:
        raise DataError(f"{path} is empty; {_REMEDY}")
    found = int.from_bytes(content[:4], "big")
    if found in _CONTENTS and found != magic:
        raise DataError(f"{path} holds {_CONTENTS[found]}, not {_CONTENTS[magic]}; {_REMEDY}")
    if found != magic:
        raise DataError(
            f"{path} is no IDX file of {_CONTENTS[magic]} "
            f"(it starts with {content[:4].hex()}, not {magic:08x}); {_REMEDY}"
        )


def _content(path: Path) -> bytes:
    """Return what the file holds, decompressed in memory: the folder may be read-only."""
    try:
        content = path.read_bytes()
        # By content rather than by name, since browsers decompress downloads and keep the name.
        return gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content
    except EOFError as error:
        raise DataError(f"{path} is truncated: its gzip stream ends early; {_REMEDY}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}; {_REMEDY}") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; check its permissions"
        ) from error


def read_tensor(path: Path) -> Tensor:
    """Return the one tensor or array of a .pt or .npy file."""
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # which one depends on what the damaged file looks like
        raise DataError(f"{path} cannot be read as a .pt or .npy file of one tensor") from error
    if not isinstance(content, Tensor):
        raise DataError(f"{path} holds a {type(content).__name__}, not one tensor; {LAYOUT}")
    return content


def read_image(path: Path) -> Tensor:
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
