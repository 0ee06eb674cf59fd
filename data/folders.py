"""A folder of image files: what is for training, validation and testing, and the classes."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.files import read_picture
from data.images import DataError, ImageSplits, Split, assemble, described

Names = tuple[str, ...]
"""The path of an image file from a folder on, part by part."""
Part = tuple[Path, list[Names]]
"""A folder and the image files in it and below."""

_SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".jfif")
_HIDDEN = (".", "__MACOSX", "@eaDir")
_SPLIT_WORDS: dict[Split, str] = {
    "train": "train|training|trn|trainval",
    "validation": "val|valid|validation|validate|dev|development",
    "test": "test|testing|tst",
}
_ABBREVIATIONS: dict[str, Split] = {"tr": "train", "va": "validation", "te": "test"}
"""Of splits where all subfolders are called so: alone they may be classes, as of languages."""
_PLAIN_WORDS = "sets?|data|datasets?|splits?|images?|imgs?|digits|samples"


def read_folder(folder: Path) -> ImageSplits:
    """Read images of one size from a folder, in subfolders that name their classes or without.

    Subfolders called train, val and test, in any usual spelling, hold the images of that split.
    Links are followed; hidden files and folders are left out; a folder that holds nothing but one
    folder of classes or splits stands for that one.

    Raises:
        DataError: There are no images, one cannot be read or has another size, or the names of the
            subfolders leave open which images are for what.
    """
    visible = [path.relative_to(folder).parts for path in _visible_files(folder, {})]
    files = [names for names in visible if names[-1].lower().endswith(_SUFFIXES)]
    if not files:
        raise DataError(
            f"{folder} holds no image files ({', '.join(_SUFFIXES)}); a .pt or .npy file is named "
            "itself, and MNIST's files are read by the name mnist, from a root"
        )
    outer, left_out = folder, len(visible) - len(files)
    while (only := _only_folder(files)) and min(map(len, files)) > 2 and not _names_split(only)[1]:
        outer, files = _inside(only, (outer, files))
    folders = _split_folders(outer, files)
    parts = {split: _inside(top, (outer, files)) for top, split in folders.items()}
    parts = {split: _without_repeats(split, part) for split, part in parts.items()}
    parts = parts or {"train": (outer, files)}
    classes = sorted({_class(names) for _, files in parts.values() for names in files})
    told = [f"folders {', '.join(folders)}"] if folders else []
    told.append(f"classes {_listed(classes)}" if any(classes) else "no classes")
    if left_out:
        told.append(f"other files left out: {left_out}")
    read = {split: _read(part, classes) for split, part in parts.items()}
    return assemble(str(folder), read, "; ".join(told))


def _visible_files(folder: Path, seen: dict[tuple[int, int], Path], *above: Path) -> Iterator[Path]:
    """Yield the files in a folder and below, ordered by name; links are followed, but for loops."""
    real = folder.resolve()
    if real in above:
        return
    _check_new(folder, seen)
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    for path in inside:
        if path.name.startswith(_HIDDEN):
            continue
        if path.is_dir():
            yield from _visible_files(path, seen, *above, real)
        elif not path.exists():
            raise DataError(f"{path} is a link to nothing; mend or remove it")
        else:
            _check_new(path, seen)
            yield path


def _check_new(path: Path, seen: dict[tuple[int, int], Path]) -> None:
    """Raise DataError for what was seen by another name: it could be in two splits or classes."""
    found = path.stat()
    first = seen.setdefault((found.st_dev, found.st_ino), path)
    if first is not path:
        raise DataError(f"{path} and {first} are one by a link; remove one of them")


def _only_folder(files: list[Names]) -> str | None:
    """Return the subfolder that holds all files, if there is one."""
    first = {names[0] if len(names) > 1 else None for names in files}
    return first.pop() if len(first) == 1 else None


def _inside(top: str, part: Part) -> Part:
    folder, files = part
    return folder / top, [names[1:] for names in files if names[0] == top]


@cache  # of a few names, asked for with every file
def _names_split(name: str) -> tuple[Split | None, bool]:
    """Return which split the name of a folder names, and whether it says nothing else."""
    words = [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]
    named: set[Split] = set()
    others = set(words)
    for split, spellings in _SPLIT_WORDS.items():
        spelt = {word for word in words if re.fullmatch(f"({spellings})({_PLAIN_WORDS})?", word)}
        others -= spelt
        named |= {split} if spelt else set()
    if len(named) != 1:
        return None, False
    return named.pop(), all(re.fullmatch(_PLAIN_WORDS, word) for word in others)


def _split_folders(folder: Path, files: list[Names]) -> dict[str, Split]:
    """Return the split that each subfolder names; none of them where subfolders are classes.

    One name that says something else, too, may be a class, as train_station. Two, as seg_train and
    seg_test, are splits.
    """
    tops = {names[0] if len(names) > 1 else "" for names in files}
    if len(tops) > 1 and "tr" in tops and tops <= _ABBREVIATIONS.keys():
        return {top: _ABBREVIATIONS[top] for top in sorted(tops)}
    named: dict[str, Split] = {}
    certain = False
    for path in sorted(folder.iterdir()):
        split, plain = _names_split(path.name)
        if split is not None and path.is_dir() and not path.name.startswith(_HIDDEN):
            named[path.name] = split
            certain |= plain
    if not certain and len(set(named.values())) < 2:
        return {}
    together = ", ".join(named)
    if len(set(named.values())) < len(named):
        raise DataError(f"{folder}: of its folders {together} two name one split; keep one of them")
    beside = next((names for names in files if names[0] not in named), None)
    if beside is not None:
        raise DataError(
            f"{folder} holds {'/'.join(beside)} beside the splits {together}; move all images into "
            "the splits, or rename what is a class"
        )
    if "train" not in named.values():
        raise DataError(
            f"{folder} holds {together} without images for training; call their folder train, or "
            "rename what is a class"
        )
    return named


def _without_repeats(split: Split, part: Part) -> Part:
    """Return what is in train/train for train, as archives unpack."""
    while (only := _only_folder(part[1])) and _names_split(only)[0] == split:
        part = _inside(only, part)
    return part


def _class(names: Names) -> str:
    return names[0] if len(names) > 1 else ""


def _listed(classes: list[str], most: int = 10) -> str:
    names = [name or "(none)" for name in classes[:most]]
    return ", ".join(names) + (f" and {len(classes) - most} more" if len(classes) > most else "")


def _read(part: Part, classes: list[str]) -> tuple[Tensor, Tensor]:
    """Return the images of a split, (N, C, H, W), and their labels, (N,)."""
    folder, files = part
    if not files:
        raise DataError(f"{folder} holds no image files ({', '.join(_SUFFIXES)})")
    images: list[Tensor] = []
    for names in files:
        path = folder.joinpath(*names)
        inner = next((name for name in names[:-1] if _names_split(name)[1]), None)
        if inner is not None:
            raise DataError(
                f"{path}: the folder {inner} of a split is inside another; make the splits the "
                f"outer folders, as in {inner}/{names[0]}, or rename what is a class"
            )
        image = read_picture(path)
        first = images[0] if images else image
        if (image.shape, image.dtype) != (first.shape, first.dtype):
            raise DataError(
                f"{path} is {described(image[None])}, {folder.joinpath(*files[0])} is "
                f"{described(first[None])}; give all images one size and depth, and either grey "
                "levels or colours"
            )
        images.append(image)
    return torch.stack(images), torch.tensor([classes.index(_class(names)) for names in files])
