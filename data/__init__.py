"""Image data sets as LightningDataModules."""

from data.batches import Batches, shard_indices
from data.images import (
    MNIST_SHAPE,
    DataError,
    DataUnavailable,
    ImageShape,
    ImageSplits,
    grey_levels,
    splits_of_tensors,
)
from data.module import ImageDataModule, Split
from data.sources import NAMES, Name, check_heldout, download_images, load_images
from data.splits import BINARIZATION_SEED, SPLIT_SEED

__all__ = [
    "BINARIZATION_SEED",
    "MNIST_SHAPE",
    "NAMES",
    "SPLIT_SEED",
    "Batches",
    "DataError",
    "DataUnavailable",
    "ImageDataModule",
    "ImageShape",
    "ImageSplits",
    "Name",
    "Split",
    "check_heldout",
    "download_images",
    "grey_levels",
    "load_images",
    "shard_indices",
    "splits_of_tensors",
]
