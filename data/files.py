"""Files of images: IDX, the format of MNIST and its relatives; one tensor; a picture.

torchvision's reader of IDX files decompresses beside the file, which fails in a read-only folder,
and reports a damaged file as a bare assertion.
"""

import gzip
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.images import LAYOUT, DataError

IMAGE_SIDE = 28
IMAGE_MAGIC = 0x00000803
LABEL_MAGIC = 0x00000801
GZIP_MAGIC = b"\x1f\x8b"

_IDX_NAME = re.compile(
    r"(train|t10k|test)[-_. ]?(images|labels)([-_. ]?idx[13])?([-_. ]?ubyte)?(\.gz)?"
)
_CONTENTS = {IMAGE_MAGIC: "images", LABEL_MAGIC: "labels"}
_MODES = {"1": "L", "L": "L", "LA": "L"} | dict.fromkeys(("RGB", "RGBA", "P", "PA"), "RGB")
"""What the pixels of an image file are converted to."""
_REMEDY = "replace it by a sound copy, or delete it to have it downloaded again"


def find_idx(folder: Path, name: str) -> Path | None:
    """Return the path of an IDX file of MNIST in ``folder``, or None.

    It has the name itself, plain or with ``.gz``, or one nearly the same, as
    ``train-images.idx3-ubyte``, or lies in a folder of such a name, as archives unpack.
    """
    near = [path for path in _inside(folder) if _content_named(path.name) == _content_named(name)]
    near += [inner for path in near for inner in _inside(path) if _content_named(inner.name)]
    paths = (folder / name, folder / f"{name}.gz", *near)
    return next((path for path in paths if os.path.isfile(path)), None)


def _content_named(name: str) -> tuple[str, str] | None:
    """Return of which split a file of nearly this name holds what."""
    named = _IDX_NAME.fullmatch(name.lower())
    return None if named is None else (named[1].replace("test", "t10k"), named[2])


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # none there, or none that can be seen
        return []


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


def read_tensor(path: Path) -> Tensor | np.ndarray:
    """Return the one tensor or array of a .pt or .npy file.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    try:
        if path.suffix in (".npy", ".npz"):
            content = np.load(path, allow_pickle=False)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # which one depends on what the damaged file looks like
        raise DataError(f"{path} cannot be read as a .pt or .npy file of one tensor") from error
    if not isinstance(content, Tensor | np.ndarray):
        raise DataError(
            f"{path} holds a {type(content).__name__}, not one tensor; save the images alone: "
            f"{LAYOUT}"
        )
    return content


def read_picture(path: Path) -> Tensor:
    """Return the pixels of an image file, turned as it says, (C, H, W).

    They are uint8, int32 where the file has more bits, float32 where it has such numbers.

    Raises:
        DataError: The file cannot be read, holds several images, or is neither grey nor RGB.
    """
    try:
        with Image.open(path) as image:
            _check_picture(path, image)
            pixels = _pixels(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:  # which one depends on the format and on what is damaged
        raise DataError(f"{path} cannot be read as an image; replace or remove it") from error
    if pixels is None:
        raise DataError(
            f"{path} has pixels of type {image.mode}; convert it to grey or RGB, without "
            "transparency"
        )
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _check_picture(path: Path, image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph with its preview
        raise DataError(f"{path} holds {frames} images; save each in a file of its own")
    # Pillow would take their upper 8 bits; in a BMP it means 16 bits of all three colours.
    if image.mode in _MODES and image.format != "BMP" and ";16" in str(getattr(image, "tile", "")):
        raise DataError(f"{path} has 16 bits a colour; convert it to 8, or to grey levels")


def _pixels(image: Image.Image) -> np.ndarray | None:
    """Return pixels (H, W) or (H, W, 3); None where the file has other colours."""
    if image.mode.startswith(("I", "F")):
        return np.array(image).astype(np.float32 if image.mode == "F" else np.int32)
    mode = _MODES.get(image.mode)
    if image.mode.endswith("A") or "transparency" in image.info:
        opaque = image.convert("RGBA").getchannel("A").getextrema()[0] == 255
        mode = mode if opaque else None
    if mode is None:
        return None
    pixels = np.array(image.convert(mode))
    is_grey = image.mode in ("P", "PA") and (pixels == pixels[..., :1]).all()
    return pixels[..., 0] if is_grey else pixels
