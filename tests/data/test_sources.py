"""Every place that images come from: the sets with a name, files, folders, tensors."""

import gzip
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from data import DataError, ImageDataModule, Split, load_images
from data.images import DataUnavailable, grey_levels
from data.sources import _FILES as FILES
from data.sources import NAMES, download_images

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
GREY = np.linspace(0, 255, 80).astype(np.uint8).repeat(28 * 28).reshape(80, 28, 28)
"""Images that differ in their one grey level."""
MakeRoot = Callable[..., Path]
Make = Callable[..., ImageDataModule]


def idx(name: str, folder: str, compress: bool) -> Callable[..., Make]:
    def store(path: Path, write_idx: Callable[..., None]) -> Make:
        write_idx(path / folder / "raw", GREY[:60], GREY[60:], compress)
        return lambda **options: ImageDataModule(name, path, **options)

    return store


def path(name: str, write: Callable[[Path], object]) -> Callable[..., Make]:
    def store(path: Path, write_idx: Callable[..., None]) -> Make:
        write(path / name)
        return lambda **options: ImageDataModule(path / name, **options)

    return store


def pictures(convert: Callable[[np.ndarray], Image.Image]) -> Callable[..., Make]:
    def write(folder: Path) -> None:
        folder.mkdir()
        for index, image in enumerate(GREY):
            convert(image).save(folder / f"{index}.png")

    return path("images", write)


def tensors(convert: Callable[[np.ndarray], np.ndarray | Tensor]) -> Callable[..., Make]:
    return lambda *_: lambda **options: ImageDataModule.from_tensors(convert(GREY), **options)


SOURCES = {
    "mnist": idx("mnist", "MNIST", False),
    "mnist gzip": idx("mnist", "MNIST", True),
    "fashion-mnist": idx("fashion-mnist", "FashionMNIST", True),
    "kmnist": idx("kmnist", "KMNIST", True),
    "npy": path("images.npy", lambda path: np.save(path, GREY)),
    "npy big-endian": path("images.npy", lambda path: np.save(path, GREY.astype(">i4"))),
    "pt": path("images.pt", lambda path: torch.save(torch.tensor(GREY), path)),
    "pt float64": path("images.pt", lambda path: torch.save(torch.tensor(GREY) / 255.0, path)),
    "grey png": pictures(Image.fromarray),
    "palette png": pictures(lambda image: Image.fromarray(image).convert("P")),
    "opaque png": pictures(lambda image: Image.fromarray(image).convert("LA")),
    "16-bit png": pictures(lambda image: Image.fromarray(image * np.uint16(257))),
    "array of 16 bits": tensors(lambda images: images * np.uint16(257)),
    "tensor of int64": tensors(lambda images: torch.tensor(images).long()),
    "flipped float array": tensors(lambda images: (images / np.float32(255))[:, ::-1]),
}


@pytest.mark.parametrize("store", SOURCES.values(), ids=SOURCES.keys())
def test_images_keep_their_grey_levels_and_are_drawn_with_them(
    store: Callable[..., Make], tmp_path: Path, write_idx: Callable[..., None], attach: Make
) -> None:
    make = store(tmp_path, write_idx)
    grey, binary, other = (
        make(validation=6, batch_size=20, **options)
        for options in ({"binarize": False}, {}, {"seed": 5})
    )
    for module in (grey, binary, other):
        module.setup()
        assert module.image_shape == (1, 28, 28)
    levels = torch.cat([grey.heldout(split) for split in SPLITS])
    assert (levels == levels[:, :1]).all()
    expected = torch.tensor(GREY[:, 0, 0]) / 255
    torch.testing.assert_close(levels[:, 0].sort().values, expected, rtol=0, atol=1e-7)
    assert len(grey.heldout("validation")) == 6

    batch = next(iter(attach(binary).train_dataloader()))
    drawn = [(binary.heldout(split), grey.heldout(split)) for split in SPLITS]
    drawn.append((binary.on_after_batch_transfer(batch, 0), grey_levels(batch)))
    for pixels, probability in drawn:
        assert set(pixels.unique().tolist()) <= {0.0, 1.0}
        share = probability[:, 0]
        error = (share * (1 - share) / 784).sqrt()
        assert ((pixels.mean(dim=1) - share).abs() <= 5 * error).all()
    assert torch.equal(attach(grey).on_after_batch_transfer(batch, 0), grey_levels(batch))
    for split in SPLITS:
        assert torch.equal(binary.heldout(split), other.heldout(split))


def test_local_files_are_read_with_their_labels_and_left_as_they_are(make_root: MakeRoot) -> None:
    folder = make_root() / "MNIST" / "raw"
    before = sorted(folder.iterdir())
    folder.chmod(0o555)
    try:
        splits = load_images("mnist", folder.parents[1])
    finally:
        folder.chmod(0o755)
    assert sorted(folder.iterdir()) == before
    assert splits.name == "mnist"
    assert splits.train_labels.tolist() == [index % 10 for index in range(60)]
    assert splits.test_labels.shape == (20,)


@pytest.mark.parametrize(
    ("folder", "spelling"),
    [
        ("MNIST/raw", lambda file: file.replace("-idx", ".idx")),
        ("MNIST/raw", lambda file: f"{file}/{file}"),
        ("MNIST", str.upper),
        ("mnist", lambda file: file.replace("t10k", "test").replace("-", "_")),
        ("mnist/raw", lambda file: file.split("-idx")[0]),
        ("raw", str),
        ("", str),
    ],
)
@pytest.mark.parametrize("compress", [True, False])
def test_files_elsewhere_and_under_nearly_their_names(
    folder: str, spelling: Callable[[str], str], compress: bool, make_root: MakeRoot, tmp_path: Path
) -> None:
    written, root = make_root(compress=compress) / "MNIST" / "raw", tmp_path / "other"
    for path in list(written.iterdir()):
        place = root / folder / (spelling(path.stem) + path.suffix)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
        place.with_name(f"._{place.name}").write_bytes(b"what macOS puts beside")
    module = ImageDataModule("mnist", root, validation=6)
    module.setup()
    assert module.dataset_name == "mnist"
    assert [len(module.labels(split)) for split in SPLITS] == [54, 6, 20]


def test_files_of_one_set_are_not_taken_for_another(make_root: MakeRoot) -> None:
    raw = make_root(folder="fashion_mnist") / "fashion_mnist" / "raw"
    assert load_images("fashion-mnist", raw.parents[1]).name == "fashion-mnist"
    assert load_images("fashion-mnist", raw).name == "fashion-mnist"
    for name, root in (("mnist", raw), ("mnist", raw.parent), ("kmnist", raw.parents[1])):
        with pytest.raises(DataError, match=f"{name} is (not|neither) in"):
            load_images(name, root)


@pytest.mark.parametrize(
    "file",
    [
        "train.csv",
        "a/b/c/mnist.npz",
        "FashionMNIST/raw/x-idx3-ubyte",
        "cats/1.JPG",
        "m.hdf5",
        "m.7z",
    ],
)
def test_nothing_takes_the_place_of_mnist_where_the_root_has_images(
    file: str, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    message = rf"MNIST/raw and .*\(no network\), but .*{file}; .* called {FILES[0]}"
    with pytest.raises(DataError, match=message) as caught:
        ImageDataModule("mnist", tmp_path).setup()
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_damaged_are_named_and_not_replaced(make_root: MakeRoot) -> None:
    root = make_root()
    for file in FILES:
        path = root / "MNIST" / "raw" / f"{file}.gz"
        aside = path.rename(root.parent / file)
        with pytest.raises(DataError, match=f"{file} is missing") as caught:
            ImageDataModule("mnist", root).setup()
        assert "\n" not in str(caught.value)
        aside.rename(path)
    path = root / "MNIST" / "raw" / f"{FILES[2]}.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="truncated"):
        ImageDataModule("mnist", root).setup()
    assert path.stat().st_size == 100
    labels = path.with_name(f"{FILES[1]}.gz")
    labels.write_bytes(gzip.compress(bytes.fromhex("00000801 00000003 00 01 02")))
    with pytest.raises(DataError, match="has 3 labels for the 60 images"):
        ImageDataModule("mnist", root).setup()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
def test_no_network(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataUnavailable, match=f"{tmp_path}.*no network") as caught:
        load_images(name, tmp_path / "new" / "root")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(DataUnavailable):
        load_images(name, tmp_path / "file")


def test_a_download_brings_what_is_missing_and_is_quiet(
    make_root: MakeRoot, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = make_root()
    folder = root / "MNIST" / "raw"
    complete = {path.name: path.read_bytes() for path in folder.iterdir()}
    kept, *lost = sorted(complete)
    for name in lost:
        (folder / name).unlink()
    (folder / kept).write_bytes(complete[kept] + b" ")

    def download(self: datasets.MNIST) -> None:
        print("100%")
        assert socket.getdefaulttimeout() is not None
        Path(self.raw_folder).mkdir(parents=True)
        for name, content in complete.items():
            (Path(self.raw_folder) / name).write_bytes(content)
            (Path(self.raw_folder) / name).with_suffix("").write_bytes(gzip.decompress(content))

    monkeypatch.setattr(datasets.MNIST, "download", download)
    download_images("mnist", root)

    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {**complete, kept: complete[kept] + b" "}
    assert capfd.readouterr() == ("", "")
    assert socket.getdefaulttimeout() is None


def test_mnist_5k_and_its_split_never_change() -> None:
    splits = load_images("mnist-5k")
    assert splits.name == "mnist-5k"
    assert splits.train_labels.bincount().tolist() == [450] * 10
    assert splits.test_labels.bincount().tolist() == [50] * 10
    both = torch.cat([splits.train_images, splits.test_images])
    assert both.unique(dim=0).shape == (5000, 784)
    weights = torch.arange(1, 501)
    assert (splits.test_images.sum(dim=1) * weights).sum() == 3344520866


def test_what_is_no_data_set() -> None:
    for name in ("imagenet", "no/such/folder", "", "~/no/such/folder", 300 * "x"):
        with pytest.raises(DataError, match=f"{', '.join(NAMES)}, or name a folder of images"):
            ImageDataModule(name)
    with pytest.raises(DataError, match="not a ndarray; images in memory are for"):
        ImageDataModule(GREY)  # type: ignore[arg-type]
