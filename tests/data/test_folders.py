"""Folders of image files: what is read as what, and what is refused."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, ImageDataModule, Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LEVELS: dict[Split, int] = {"train": 60, "validation": 120, "test": 240}


def write(folder: Path, count: int = 20, level: int = 100) -> None:
    """Write images of ten grey levels from ``level`` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.full((4, 6), level + index % 10, np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")


def loaded(folder: Path, validation: int | None = None) -> ImageDataModule:
    module = ImageDataModule(folder, validation=validation, binarize=False)
    module.setup()
    return module


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "val", "test"),
        ("Training", "Valid", "TESTING"),
        ("train_images", "dev-set", "TestData"),
        ("images_train", "validation2017", "tst"),
        ("tr", "va", "te"),
        ("seg_train/seg_train", "seg_val/seg_val", "seg_test/seg_test"),
        ("archive/digits/train", "archive/digits/validation", "archive/digits/test"),
    ],
)
@pytest.mark.parametrize("present", [SPLITS, SPLITS[:2], SPLITS[::2]])
def test_folders_of_splits(
    folders: tuple[str, ...],
    present: tuple[Split, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for split, folder in zip(SPLITS, folders, strict=True):
        for label in ("light", "dark") if split in present else ():
            write(tmp_path / folder / label, level=LEVELS[split] - 10 * (label == "dark"))
    module = loaded(tmp_path)
    for split in SPLITS:
        level = LEVELS[split if split in present else "train"]
        found = 255 * module.heldout(split)[:, 0]
        assert ((found - level).abs() < 10.1).all()
        assert torch.equal(module.labels(split), (found > level - 0.5).long())
    assert sum(len(module.labels(split)) for split in SPLITS) == 40 * len(present)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert line.startswith(f"{tmp_path}: {module.counts}; folders ")
    assert line.endswith("; classes dark, light\n")


def test_languages_are_classes_though_one_abbreviates_a_split(tmp_path: Path) -> None:
    for folder in ("tr", "te", "fr"):
        write(tmp_path / folder)
    assert loaded(tmp_path).labels("train").unique().tolist() == [0, 1, 2]


def test_validation_images_of_their_own_leave_no_choice(tmp_path: Path) -> None:
    for folder in ("train", "val"):
        write(tmp_path / folder)
    assert len(loaded(tmp_path, validation=20).labels("validation")) == 20
    for other in (0, 5):
        with pytest.raises(DataError, match=f"its own 20 validation .* instead of {other}"):
            loaded(tmp_path, validation=other)


def test_folders_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train_station", "devils", "beach"):
        write(tmp_path / "places" / name)
    loaded(tmp_path)
    assert capsys.readouterr().out.endswith("; classes beach, devils, train_station\n")
    write(tmp_path, 10)
    (tmp_path / "notes.txt").touch()
    module = loaded(tmp_path)
    counts = torch.cat([module.labels(split) for split in SPLITS]).bincount()
    assert counts.tolist() == [10, 60]
    assert capsys.readouterr().out.endswith("; classes (none), places; other files left out: 1\n")


def test_links_are_followed_and_what_is_hidden_is_not(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for folder in (images / "cats", elsewhere / "dogs", elsewhere / "files"):
        write(folder)
    (images / "dogs").symlink_to(elsewhere / "dogs")
    (images / "dogs" / "again").symlink_to(images)
    (images / "cats" / "self").symlink_to(".")
    (images / "cats" / "one.png").symlink_to(elsewhere / "files" / "00.png")
    for hidden in (".ipynb_checkpoints", "__MACOSX/cats", "cats/.thumbnails", "cats/@eaDir"):
        write(images / hidden)
    (images / "cats" / "._00.png").write_bytes(b"what macOS puts beside")
    module = loaded(images)
    counts = torch.cat([module.labels(split) for split in SPLITS]).bincount()
    assert counts.tolist() == [21, 20]


def test_photographs_are_turned_as_they_say(tmp_path: Path) -> None:
    upright = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    rotated = Image.fromarray(np.rot90(upright).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    for index in range(10):
        rotated.save(tmp_path / f"{index}.png", exif=exif)
    module = loaded(tmp_path)
    assert module.image_shape == (1, 4, 6)
    assert torch.equal(module.heldout("train")[0], torch.tensor(upright).flatten() / 255)


def test_colours_and_previews(tmp_path: Path) -> None:
    colours = np.zeros((4, 6, 3), np.uint8) + np.array([10, 60, 110], np.uint8)
    image = Image.fromarray(colours)
    for index, mode in enumerate(5 * ("RGB", "RGBA", "P")):
        image.convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / f"{index}.png")
    module = loaded(tmp_path)
    assert module.image_shape == (3, 4, 6)
    expected = torch.tensor(colours).permute(2, 0, 1).flatten() / 255
    assert (module.heldout("train") == expected).all()
    for index in range(15):
        (tmp_path / f"{index}.png").unlink()
        image.save(tmp_path / f"{index}.jpg", "MPO", save_all=True, append_images=[image])
    assert (loaded(tmp_path).heldout("train") - expected).abs().max() < 0.05


def png_of_sixteen_bits_a_colour() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        size, check = len(content), zlib.crc32(kind + content)
        return struct.pack(">I", size) + kind + content + struct.pack(">I", check)

    header, rows = struct.pack(">IIBBBBB", 6, 4, 16, 2, 0, 0, 0), 4 * (b"\0" + 18 * b"\0\1")
    parts = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("L", (7, 4)), "5.png is 1 x 4 x 7 uint8, .*00.png is 1 x 4 x 6 uint8; give all"),
        (Image.new("RGB", (6, 4)), "5.png is 3 x 4 x 6 uint8, .*00.png is 1 x 4 x 6 uint8"),
        (Image.new("I;16", (6, 4)), "5.png is 1 x 4 x 6 int32, .*one size and depth"),
        (Image.new("RGBA", (6, 4)), "5.png has pixels of type RGBA; convert it to grey or RGB"),
        (Image.new("CMYK", (6, 4)), "5.png has pixels of type CMYK; convert it to grey or RGB"),
        (png_of_sixteen_bits_a_colour(), "5.png has 16 bits a colour; convert it"),
        (b"\x89PNG\r\n\x1a\n", "5.png cannot be read as an image; replace or remove it"),
        (b"", "5.png cannot be read as an image"),
        ([Image.new("L", (6, 4), level) for level in (0, 9)], "5.png holds 2 images; save each"),
    ],
)
def test_pictures_that_cannot_be(
    picture: Image.Image | list[Image.Image] | bytes, message: str, tmp_path: Path
) -> None:
    write(tmp_path)
    path = tmp_path / "5.png"
    if isinstance(picture, bytes):
        path.write_bytes(picture)
    elif isinstance(picture, list):
        picture[0].save(path, "GIF", save_all=True, append_images=picture[1:])
    else:
        picture.save(path, "JPEG" if picture.mode == "CMYK" else "PNG")
    with pytest.raises(DataError, match=message) as caught:
        loaded(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folders", "links", "message"),
    [
        ("", {}, "images holds no image files"),
        (".cats", {}, "images holds no image files"),
        ("cats", {"a": "nowhere"}, "a is a link to nothing; mend or remove it"),
        ("cats", {"test": "cats"}, "test and .*cats are one by a link; remove one"),
        ("train test", {"test/a.png": "../train/00.png"}, "00.png and .*a.png are one by a link"),
        ("train", {"val": "../empty"}, "val holds no image files"),
        ("cats test", {}, "holds cats/00.png beside the splits test; move all images"),
        ("train .", {}, "holds 00.png beside the splits train"),
        ("val test", {}, "holds test, val without images for training; call their folder train"),
        ("train Training", {}, "its folders Training, train two name one split; keep one"),
        ("trainA trainB testA", {}, "its folders testA, trainA, trainB two name one split"),
        ("cats/train dogs/train", {}, "the folder train of a split is inside .*, as in train/cats"),
    ],
)
def test_folders_that_leave_open_what_is_what(
    folders: str, links: dict[str, str], message: str, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    for folder in (images, tmp_path / "empty"):
        folder.mkdir()
    for name in folders.split():
        write(images / name)
    for name, target in links.items():
        (images / name).symlink_to(target)
    with pytest.raises(DataError, match=message) as caught:
        loaded(images)
    assert str(images) in str(caught.value)
    assert "\n" not in str(caught.value)
