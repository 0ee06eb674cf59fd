"""Image data sets as LightningDataModules."""

from data.batches import Batches, share
from data.errors import DataError, DataUnavailable
from data.module import ImageDataModule, Split
from data.sources import NAMES, ImageSplits, Name, check_heldout, download_images, load_images
from data.splits import BINARIZATION_SEED, SPLIT_SEED

__all__ = [
    "BINARIZATION_SEED",
    "NAMES",
    "SPLIT_SEED",
    "Batches",
    "DataError",
    "DataUnavailable",
    "ImageDataModule",
    "ImageSplits",
    "Name",
    "Split",
    "check_heldout",
    "download_images",
    "load_images",
    "share",
]
