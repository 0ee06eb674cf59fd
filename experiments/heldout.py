"""The images that a trained model is judged on."""

from dataclasses import dataclass
from typing import Any

from data import ImageDataModule, Name, Split, check_heldout


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the images come from.

    Args:
        name: The data set; by default the one that the model was trained on.
        root: The folder of the data sets.
    """

    name: Name | None = None
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
        DataError: The model was trained on these very images.
    """
    data = ImageDataModule(
        options.name or trained["dataset_name"],
        options.root,
        validation=trained["validation"],
    )
    data.setup()
    if split != "train":
        check_heldout(trained["dataset_name"], data.dataset_name)
    return data
