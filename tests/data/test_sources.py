import gzip
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision import datasets

from data import DataError, check_heldout, load_images
from data.images import DataUnavailable
from data.sources import NAMES, download_images, is_absent

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MakeRoot = Callable[..., Path]


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")],
)
def test_local_files(make_root: MakeRoot, name: str, folder: str, compress: bool) -> None:
    splits = load_images(name, make_root(folder=folder, compress=compress))

    assert splits.name == name
    assert splits.train_images.shape == (60, 784)
    assert splits.test_images.shape == (20, 784)
    assert splits.train_images.dtype == splits.test_images.dtype == torch.uint8
    assert splits.train_labels.tolist() == [index % 10 for index in range(60)]
    assert splits.test_labels.shape == (20,)


def test_a_read_only_folder_is_left_as_it_is(make_root: MakeRoot) -> None:
    folder = make_root() / "MNIST" / "raw"
    before = sorted(folder.iterdir())
    folder.chmod(0o555)
    try:
        load_images("mnist", folder.parents[1])
    finally:
        folder.chmod(0o755)
    assert sorted(folder.iterdir()) == before


def test_a_damaged_file_is_not_replaced(make_root: MakeRoot) -> None:
    root = make_root()
    path = root / "MNIST" / "raw" / f"{FILES[2]}.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="truncated") as caught:
        load_images("mnist", root)
    assert not isinstance(caught.value, DataUnavailable)
    assert path.stat().st_size == 100


@pytest.mark.parametrize("file", FILES)
def test_one_missing_file(make_root: MakeRoot, file: str) -> None:
    root = make_root()
    (root / "MNIST" / "raw" / f"{file}.gz").unlink()
    with pytest.raises(DataError, match=f"{file} is missing") as caught:
        load_images("mnist", root)
    assert not isinstance(caught.value, DataUnavailable)
    assert "\n" not in str(caught.value)


def test_counts_that_differ(make_root: MakeRoot) -> None:
    root = make_root()
    content = bytes.fromhex("00000801 00000003 00 01 02")
    (root / "MNIST" / "raw" / f"{FILES[1]}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match="has 3 labels for the 60 images") as caught:
        load_images("mnist", root)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=", ".join(NAMES)):
        load_images("imagenet")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
def test_no_network(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataUnavailable, match="no network") as caught:
        load_images(name, tmp_path / "new" / "root")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert is_absent(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataUnavailable):
        load_images("mnist", tmp_path / "file")


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

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        **complete,
        kept: complete[kept] + b" ",
    }
    assert capfd.readouterr() == ("", "")
    assert socket.getdefaulttimeout() is None


def test_mnist_5k() -> None:
    splits = load_images("mnist-5k")

    assert splits.name == "mnist-5k"
    assert splits.train_images.shape == (4500, 784)
    assert splits.test_images.shape == (500, 784)
    assert splits.train_labels.bincount().tolist() == [450] * 10
    assert splits.test_labels.bincount().tolist() == [50] * 10
    assert splits.train_images.max() == 255
    both = torch.cat([splits.train_images, splits.test_images])
    assert len(both.unique(dim=0)) == 5000


def test_the_split_of_mnist_5k_never_changes() -> None:
    splits = load_images("mnist-5k")
    weights = torch.arange(1, 501)
    assert (splits.test_images.sum(dim=1) * weights).sum() == 3344520866


def test_digits_seen_in_training_are_not_held_out() -> None:
    with pytest.raises(DataError, match="training images of mnist"):
        check_heldout("mnist", "mnist-5k")
    for name in NAMES:
        check_heldout(name, name)
    check_heldout("mnist-5k", "mnist")
    check_heldout("kmnist", "mnist-5k")
