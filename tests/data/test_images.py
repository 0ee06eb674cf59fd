"""What pixels mean, and which images are refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data import DataError, ImageDataModule, Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def grey(count: int = 40, height: int = 4, width: int = 6) -> Tensor:
    """Return uint8 images, each of another grey level."""
    levels = torch.arange(count, dtype=torch.uint8)
    return levels[:, None, None].expand(count, height, width).contiguous()


def loaded(module: ImageDataModule) -> ImageDataModule:
    module.setup()
    return module


def black_and_white(seed: int, count: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 4, 6)) < 0.5


@pytest.mark.parametrize(
    "kind", [bool, np.uint8, np.int64, np.uint16, ">i4", float, "png", "1-bit"]
)
def test_zeros_and_ones_are_black_and_white(kind: object, tmp_path: Path) -> None:
    bits = black_and_white(0)
    for index, image in enumerate(bits):
        pixels = image if kind == "1-bit" else image.astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index:02d}.png")
    for binarize in (True, False):
        if kind in ("png", "1-bit"):
            module = loaded(ImageDataModule(tmp_path, binarize=binarize))
        else:
            images = bits.astype(kind)  # type: ignore[call-overload]
            module = loaded(ImageDataModule.from_tensors(images, binarize=binarize))
        found = torch.cat([module.heldout(split) for split in SPLITS])
        assert sorted(found.tolist()) == sorted(bits.reshape(40, 24).astype(float).tolist())


def test_test_images_that_are_binarized_beside_grey_ones() -> None:
    bits = black_and_white(1).astype(np.uint8)
    for scale in (1, np.uint16(257)):
        module = loaded(ImageDataModule.from_tensors(5 * grey().numpy() * scale, bits))
        assert np.array_equal(module.heldout("test").view(40, 4, 6).numpy(), bits)
        assert 0 < module.heldout("train").mean() < 1


def test_tensors_keep_their_own_test_images_and_their_layout() -> None:
    colour = torch.rand(30, 3, 4, 6, requires_grad=True)
    module = loaded(ImageDataModule.from_tensors(colour, colour[:5], binarize=False, validation=0))
    assert module.image_shape == (3, 4, 6)
    assert torch.equal(module.heldout("test"), colour[:5].flatten(1))
    assert torch.equal(module.heldout("train"), colour.flatten(1))
    assert module.binarization == "none"


def with_nan(images: Tensor) -> Tensor:
    broken = images.float() / 255
    broken[[2, 5], 1, 1] = torch.nan
    return broken


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (with_nan(grey()), "2 of 40 images hold NaN or infinite numbers, the first is image 2"),
        (grey(5), "5 images are too few, use 10 or more"),
        (grey().flatten(1), r"1 or 3 channels, got \(40, 24\); give flat images their height and"),
        (torch.zeros(40, 784), r"got \(40, 784\); .*, as images.reshape\(-1, 28, 28\)"),
        (torch.zeros(40, 4, 6, 3), r"got \(40, 4, 6, 3\); put the channels first: "),
        (torch.zeros(40, 0, 6), r"got \(40, 1, 0, 6\)"),
        (torch.zeros(40, 4, 6, dtype=torch.complex64), "real numbers, got torch.complex64"),
        (grey().float(), "grey levels from 0 to 1, got 0 to 39; scale them, or do not binarize"),
        (2 * grey() / 255 - 1, "grey levels from 0 to 1, got -1 to"),
        (grey().short() - 1, "from 0 to 255, or to 65535 of 16 bits, got -1 to 38; scale them"),
        (grey().int() * 2000, "got 0 to 78000"),
        (128 * grey(40).clamp(max=1), "pixels are 0 or 128 where white is 255: divide them by 128"),
        (grey(16), r"the brightest pixel is 15 where white is 255, .* by 255 / 15"),
        (grey().int() * 100, r"the brightest pixel is 3900 where white is 65535"),
        (
            torch.cat([grey(), grey().clamp(max=1)]),
            "40 images are zeros and ones, others have levels to 39; give",
        ),
        (torch.tensor(3), r"1 or 3 channels, got \(\)"),
        (grey() / 255**2, r"the brightest pixel is 0.0005998 where white is 1,"),
        (
            [grey()],
            r"\(N, C, H, W\) with 1 or 3 channels, in one tensor or NumPy array, not a list",
        ),
        (np.array(["cats"] * 20), "not a ndarray <U4"),
    ],
)
def test_images_that_cannot_be(images: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        ImageDataModule.from_tensors(images).setup()
    assert "\n" not in str(caught.value)


def test_test_images_that_do_not_fit() -> None:
    for images, message in (
        (grey().mT, "test images are 1 x 6 x 4 uint8, those for training 1 x 4 x 6 uint8"),
        (grey() / 255, "float32, those for training 1 x 4 x 6 uint8"),
        (
            grey().int() * 1000,
            "{'train': 39, 'test': 39000}; give all images grey levels of 8 bits",
        ),
        (grey(0), r"got \(0, 1, 4, 6\)"),
    ):
        with pytest.raises(DataError, match=message):
            ImageDataModule.from_tensors(grey(), images)
    with pytest.raises(DataError, match="cannot be called mnist"):
        ImageDataModule.from_tensors(grey(), name="mnist")


class Harmful:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a .pt or .npy file of one tensor"),
        (b"PK\x03\x04 no archive", "cannot be read as"),
        ({"images": torch.zeros(2)}, "holds a dict, not one tensor"),
        (Harmful(), "cannot be read as"),
    ],
)
def test_files_that_cannot_be(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("images.pt")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(DataError, match=message):
        ImageDataModule(path).setup()
    assert not Path("executed").exists()
