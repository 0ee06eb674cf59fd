import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data.files import find_idx, read_images, read_labels
from data.images import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 784), dtype=np.uint8)
IMAGES = bytes.fromhex("00000803 00000005 0000001c 0000001c") + PIXELS.tobytes()
LABELS = bytes.fromhex("00000801 00000005 00 01 02 03 09")


@pytest.mark.parametrize("encode", [bytes, gzip.compress])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_are_read_by_their_content(
    tmp_path: Path, encode: Callable[[bytes], bytes], suffix: str
) -> None:
    (tmp_path / f"images{suffix}").write_bytes(encode(IMAGES))
    (tmp_path / f"labels{suffix}").write_bytes(encode(LABELS))

    images = read_images(tmp_path / f"images{suffix}")
    labels = read_labels(tmp_path / f"labels{suffix}")

    assert images.dtype == torch.uint8
    assert np.array_equal(images.numpy(), PIXELS)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 2, 3, 9]


DAMAGED = {
    "empty": (b"", "is empty"),
    "header": (IMAGES[:9], "truncated"),
    "truncated": (IMAGES[:-1], "truncated"),
    "truncated gzip": (gzip.compress(IMAGES)[:-30], "truncated"),
    "gzip header only": (gzip.compress(IMAGES)[:5], "truncated"),
    "damaged gzip": (gzip.compress(IMAGES)[:-8] + bytes(8), "damaged"),
    "too long": (IMAGES + b"\0", "too long"),
    "labels": (LABELS, "holds labels, not images"),
    "web page": (b"<html>Not found</html>", "no IDX file"),
    "three bytes": (b"\0\0\x08", "no IDX file"),
    "no images": (bytes.fromhex("00000803 00000000 0000001c 0000001c"), "holds no images"),
    "size": (
        bytes.fromhex("00000803 00000001 00000020 00000020") + bytes(1024),
        "32 x 32, not 28 x 28",
    ),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)

    with pytest.raises(DataError, match=message) as caught:
        read_images(path)

    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_in_place_of_labels(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(IMAGES)
    with pytest.raises(DataError, match="holds images, not labels"):
        read_labels(tmp_path / "labels")


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_images(tmp_path)


def test_find_prefers_the_plain_file(tmp_path: Path) -> None:
    assert find_idx(tmp_path, "images") is None
    (tmp_path / "images.gz").touch()
    assert find_idx(tmp_path, "images") == tmp_path / "images.gz"
    (tmp_path / "images").touch()
    assert find_idx(tmp_path, "images") == tmp_path / "images"
