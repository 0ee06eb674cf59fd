"""The images that a trained model is judged on."""

from dataclasses import dataclass, replace
from typing import Any

from data import DataError, ImageDataModule, Split, check_heldout


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the images come from.

    Args:
        name: The data set, or the path of images of your own; by default what the model was
            trained on.
        root: The folder of the data sets.
    """

    name: str | None = None
    root: str = "datasets"


def held_out(
    options: DataOptions, trained: dict[str, Any], split: Split = "test"
) -> ImageDataModule:
    """Return the data to judge on, which the model must not have been trained on.

    Arguments:
        options: Where the images come from.
        trained: What the model was trained on, as its checkpoint says.
        split: Which images will be used; those of "train" need not be held out.

    Raises:
        DataError: The model was trained on these very images, or they have changed since, or there
            are none.
    """
    own = trained["dataset_name"]
    name = options.name or own
    data = ImageDataModule(
        name,
        options.root,
        validation=trained["validation"] if name == own else None,
        binarize=trained.get("binarize", True),
    )
    data.setup()
    if data.dataset_name == own != name:  # under another path, or in the place of mnist
        return held_out(replace(options, name=own), trained, split)
    if data.dataset_name == own and data.state_dict() != trained:
        raise DataError(
            f"the images of {data.dataset_name} are others than those that the model was trained "
            "on, so that none are known to be held out; restore them, or name another data set"
        )
    if split != "train":
        check_heldout(own, data.dataset_name)
    check_split(data, split)
    return data


def check_split(data: ImageDataModule, split: Split) -> None:
    """Raise DataError where a split has no images."""
    if not len(data.labels(split)):
        raise DataError(
            f"there are no {split} images of {data.dataset_name}: the model is trained on all of "
            "them, as by --data.validation 0; choose another split"
        )
