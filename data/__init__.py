"""Image data sets as LightningDataModules."""

from data.batches import Batches, shard_indices
from data.images import MNIST_SHAPE, DataError, ImageShape, Split
from data.module import ImageDataModule
from data.sources import check_heldout, load_images

__all__ = [
    "MNIST_SHAPE",
    "Batches",
    "DataError",
    "ImageDataModule",
    "ImageShape",
    "Split",
    "check_heldout",
    "load_images",
    "shard_indices",
]
