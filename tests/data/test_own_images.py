"""Images of the user's own: tensors, files of them, and folders of image files."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import Tensor

from data import DataError, ImageDataModule, load_images

Write = Callable[[Path, Tensor], object]


def grey(count: int = 40, height: int = 4, width: int = 6) -> Tensor:
    """Return uint8 images, each of another grey level."""
    levels = torch.arange(count, dtype=torch.uint8)
    return levels[:, None, None].expand(count, height, width).contiguous()


def write_pngs(folder: Path, images: Tensor, prefix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image.numpy()).save(folder / f"{prefix}{index:03d}.png")


def loaded(module: ImageDataModule) -> ImageDataModule:
    module.setup()
    return module


@pytest.mark.parametrize(
    ("file", "write"),
    [
        ("images.pt", lambda path, images: torch.save(images, path)),
        ("images.npy", lambda path, images: np.save(path, images.numpy())),
        ("images", write_pngs),
    ],
)
def test_each_image_is_in_one_split(file: str, write: Write, tmp_path: Path) -> None:
    write(tmp_path / file, grey())
    module = loaded(ImageDataModule(str(tmp_path / file), binarize=False))
    assert module.image_shape == (1, 4, 6)
    assert module.dataset_name == str(tmp_path / file)
    found = [module.heldout(split) for split in ("train", "validation", "test")]
    assert [images.shape for images in found] == [(33, 24), (3, 24), (4, 24)]
    levels = torch.cat(found)
    assert (levels == levels[:, :1]).all()
    assert sorted((255 * levels[:, 0]).round().tolist()) == list(range(40))
    again = loaded(ImageDataModule(str(tmp_path / file), binarize=False, seed=3))
    assert torch.equal(again.heldout("test"), found[2])


def test_tensors_keep_their_own_test_images_and_their_layout() -> None:
    colour = torch.rand(30, 3, 4, 6)
    module = loaded(ImageDataModule.from_tensors(colour, colour[:5], binarize=False, validation=0))
    assert module.image_shape == (3, 4, 6)
    assert torch.equal(module.heldout("test"), colour[:5].flatten(1))
    assert torch.equal(module.heldout("train"), colour.flatten(1))
    batch = next(iter(ImageDataModule.train_dataloader(attach(module, batch_size=7))))
    assert batch.shape == (7, 72)


def attach(module: ImageDataModule, batch_size: int) -> ImageDataModule:
    """Attach what a data module sees of a trainer in the middle of training."""
    module.batch_size = batch_size
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0,
        world_size=1,
        global_step=0,
        training=True,
        accumulate_grad_batches=1,
        fit_loop=Trainer(logger=False).fit_loop,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        precision_plugin=SimpleNamespace(convert_input=lambda batch: batch),
        state=SimpleNamespace(fn=TrainerFn.FITTING),
    )
    return module


def test_pixels_are_drawn_with_their_grey_levels_or_left_as_they_are() -> None:
    images = torch.full((200, 10, 10), 0.3)
    for binarize in (True, False):
        module = loaded(ImageDataModule.from_tensors(images, binarize=binarize))
        fresh = attach(module, 10).on_after_batch_transfer(images.flatten(1), 0)
        for pixels in (module.heldout("train"), module.heldout("test"), fresh):
            if binarize:
                assert set(pixels.unique().tolist()) == {0.0, 1.0}
                error = (0.3 * 0.7 / pixels.numel()) ** 0.5
                assert abs(pixels.double().mean().item() - 0.3) < 5 * error
            else:
                assert (pixels == images[0, 0, 0]).all()
        assert module.binarization == ("fixed, seed 1" if binarize else "none")


def test_subfolders_are_classes_and_train_and_test_are_splits(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("test", 5)):
        for label in ("dark", "light"):
            write_pngs(tmp_path / split / label, grey(count))
    module = loaded(ImageDataModule(str(tmp_path)))
    assert module.labels("test").bincount().tolist() == [0, 5, 5]
    assert len(module.labels("train")) + len(module.labels("validation")) == 40
    (tmp_path / "test").rename(tmp_path / "other")
    classes = loaded(ImageDataModule(str(tmp_path)))
    assert classes.labels("test").bincount().tolist() == [1, 4]


def test_colour_and_other_formats(tmp_path: Path) -> None:
    colours = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 4, 6, 3)
    write_pngs(tmp_path, colours + torch.tensor([0, 50, 100], dtype=torch.uint8))
    (tmp_path / "readme.txt").write_text("not an image")
    images = load_images(str(tmp_path)).train_images.view(-1, 3, 4, 6)
    assert (images[:, 1] == images[:, 0] + 50).all()
    assert (images[:, 2] == images[:, 0] + 100).all()


def test_images_that_changed_are_not_gone_on_with(tmp_path: Path) -> None:
    torch.save(grey(), tmp_path / "images.pt")
    state = loaded(ImageDataModule(str(tmp_path / "images.pt"))).state_dict()
    assert state["image_shape"] == [1, 4, 6]
    attach(loaded(ImageDataModule(str(tmp_path / "images.pt"))), 10).load_state_dict(state)
    torch.save(grey().flip(2) + 1, tmp_path / "images.pt")
    other = attach(loaded(ImageDataModule(str(tmp_path / "images.pt"))), 10)
    with pytest.raises(DataError, match="resume it with the same data"):
        other.load_state_dict(state)


def with_nan(images: Tensor) -> Tensor:
    broken = images.float() / 255
    broken[[2, 5], 1, 1] = torch.nan
    return broken


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (with_nan(grey()), "2 of 40 images hold NaN or infinite numbers, the first is image 2"),
        (grey(5), "5 images are too few, use 10 or more"),
        (grey().flatten(1), r"\(N, C, H, W\) with 1 or 3 channels, got \(40, 24\)"),
        (torch.zeros(40, 4, 6, 3), r"with 1 or 3 channels, got \(40, 4, 6, 3\)"),
        (torch.zeros(40, 0, 6), r"got \(40, 1, 0, 6\)"),
        (grey().long(), "uint8 from 0 to 255 or floating-point, got torch.int64"),
        (grey().float(), "grey levels from 0 to 1, got 1 to 39; scale them, or do not binarize"),
    ],
)
def test_tensors_that_cannot_be(images: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageDataModule.from_tensors(images).setup()


def test_test_images_of_another_size_or_type() -> None:
    with pytest.raises(DataError, match="test images are 1 x 6 x 4 uint8, those for training 1 x"):
        ImageDataModule.from_tensors(grey(), grey().mT)
    with pytest.raises(DataError, match="float32, those for training 1 x 4 x 6 uint8"):
        ImageDataModule.from_tensors(grey(), grey() / 255)
    with pytest.raises(DataError, match="cannot be called mnist"):
        ImageDataModule.from_tensors(grey(), name="mnist")


def spoil_size(folder: Path) -> None:
    Image.new("L", (7, 4)).save(folder / "005.png")


def spoil_mode(folder: Path) -> None:
    Image.new("RGB", (6, 4)).save(folder / "005.png")


def spoil_alpha(folder: Path) -> None:
    Image.new("RGBA", (6, 4)).save(folder / "005.png")


def spoil_content(folder: Path) -> None:
    (folder / "005.png").write_bytes((folder / "005.png").read_bytes()[:40])


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_size, "005.png is 1 x 4 x 7 uint8, .*000.png is 1 x 4 x 6 uint8; give all images"),
        (spoil_mode, "005.png is 3 x 4 x 6 uint8, .*000.png is 1 x 4 x 6 uint8"),
        (spoil_alpha, "005.png has pixels of type RGBA; convert it to grey or RGB"),
        (spoil_content, "005.png cannot be read as an image; replace or remove it"),
        (empty, "holds no image files"),
    ],
)
def test_folders_that_cannot_be(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write_pngs(tmp_path / "images", grey())
    spoil(tmp_path / "images")
    with pytest.raises(DataError, match=message):
        ImageDataModule(str(tmp_path / "images")).setup()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a .pt or .npy file of one tensor"),
        (b"PK\x03\x04 no archive", "cannot be read as"),
        ({"images": torch.zeros(2)}, "holds a dict, not one tensor"),
    ],
)
def test_files_that_cannot_be(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "images.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(DataError, match=message):
        ImageDataModule(str(path)).setup()


class Harmful:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def test_a_file_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Harmful(), tmp_path / "images.pt")
    with pytest.raises(DataError, match="cannot be read"):
        ImageDataModule("images.pt").setup()
    assert not Path("executed").exists()


def test_a_path_that_is_not_there() -> None:
    with pytest.raises(DataError, match=r"choose one of mnist, .* or name a folder of images"):
        ImageDataModule("no/such/folder")
