"""IDX files, sound and damaged."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from data.files import find_idx, read_images, read_labels
from data.images import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 784), dtype=np.uint8)
IMAGES = bytes.fromhex("00000803 00000005 0000001c 0000001c") + PIXELS.tobytes()
LABELS = bytes.fromhex("00000801 00000005 00 01 02 03 09")
NO_IMAGES = bytes.fromhex("00000803 00000000 0000001c 0000001c")
LARGE_IMAGE = bytes.fromhex("00000803 00000001 00000020 00000020") + bytes(1024)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_are_read_by_their_content(tmp_path: Path, compress: bool, suffix: str) -> None:
    for name, content in (("images", IMAGES), ("labels", LABELS)):
        written = gzip.compress(content) if compress else content
        (tmp_path / f"{name}{suffix}").write_bytes(written)
    assert np.array_equal(read_images(tmp_path / f"images{suffix}").numpy(), PIXELS)
    assert read_labels(tmp_path / f"labels{suffix}").tolist() == [0, 1, 2, 3, 9]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (IMAGES[:9], "truncated"),
        (IMAGES[:-1], "truncated"),
        (gzip.compress(IMAGES, mtime=0)[:-30], "truncated"),
        (gzip.compress(IMAGES, mtime=0)[:5], "truncated"),
        (gzip.compress(IMAGES, mtime=0)[:-8] + bytes(8), "damaged"),
        (IMAGES + b"\0", "too long"),
        (LABELS, "holds labels, not images"),
        (b"<html>Not found</html>", "no IDX file"),
        (b"\0\0\x08", "no IDX file"),
        (NO_IMAGES, "holds no images"),
        (LARGE_IMAGE, "32 x 32, not 28 x 28"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_images(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_labels(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(IMAGES)
    with pytest.raises(DataError, match="holds images, not labels"):
        read_labels(tmp_path / "labels")
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path)


def test_the_plain_file_of_the_very_name_comes_first(tmp_path: Path) -> None:
    found = ("train_images", "train-images-idx3-ubyte.gz", "train-images-idx3-ubyte")
    for name in found:
        (tmp_path / name).touch()
        assert find_idx(tmp_path, found[-1]) == tmp_path / name
    assert find_idx(tmp_path, "t10k-images-idx3-ubyte") is None
