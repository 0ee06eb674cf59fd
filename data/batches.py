"""Batches as indices into images that already are on the device; there are no worker processes.

A plain iterable serves better than :class:`torch.utils.data.DataLoader` here: it leaves the global
random state alone, and Lightning neither replaces its sampler nor asks for workers.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data.images import DataError
from samplers.random import seeded_generator


class EpochBatches:
    """Shuffled batches of indices, a function of (seed, epoch); every process has its own share.

    Images that do not fill a batch in every process are left out, so that all batches have one
    shape; they are others in each epoch.

    Arguments:
        count: The number of images.
        batch_size: The number of images in a batch of one process.
        seed: The seed of the order.
        rank: The number of this process.
        world_size: How many processes share the images.

    Raises:
        DataError: There are too few images for one batch in every process.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size * world_size > count:
            raise DataError(
                f"a batch of {batch_size} images for each of {world_size} process(es) is more than "
                f"the {count} training images; choose a smaller batch size"
            )
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._done = 0
        self._resumed: dict[str, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Tensor]:
        # This must stay a generator, which reads the epoch when the first batch is asked for:
        # where a run starts or resumes, Lightning calls iter() before set_epoch().
        self._done = self._take_resumed()
        for indices in self._order()[self._done :]:
            self._done += 1
            yield indices

    def _order(self) -> Tensor:
        """Return this process's indices of the current epoch, (batches, batch size)."""
        generator = seeded_generator("cpu", self.seed, "data.order", self.epoch)
        order = torch.randperm(self.count, generator=generator)
        used = len(self) * self.world_size * self.batch_size
        return order[:used].view(len(self), self.world_size, self.batch_size)[:, self.rank]

    def _take_resumed(self) -> int:
        resumed, self._resumed = self._resumed, None
        return resumed["done"] if resumed is not None and resumed["epoch"] == self.epoch else 0

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches are done."""
        return {"epoch": self.epoch, "done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that are done, if the next pass is over the same epoch."""
        self._resumed = dict(state)


def shard_indices(
    count: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Sequence[Tensor]:
    """Return batches of indices that, over all processes, cover each image exactly once.

    Raises:
        DataError: A process would have no image, while others wait for its result.
    """
    if 0 < count < world_size:
        raise DataError(
            f"{count} image(s) cannot be shared among {world_size} processes; "
            "choose more images or fewer processes"
        )
    own = torch.arange(count)[rank::world_size]
    return own.split(batch_size) if len(own) else ()


class Batches:
    """Rows of a tensor, batch by batch.

    Arguments:
        images: The images, (N, 784), on the device where they are used.
        order: The indices of each batch.
    """

    def __init__(self, images: Tensor, order: Sequence[Tensor] | EpochBatches) -> None:
        self.images = images
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Tensor]:
        for indices in self.order:
            yield self.images[indices.to(self.images.device)]


class TrainingBatches(Batches):
    """Shuffled batches, whose place in the epoch Lightning keeps in its checkpoints."""

    def __init__(self, images: Tensor, order: EpochBatches) -> None:
        super().__init__(images, order)
        self.sampler = order  # where Lightning looks for set_epoch

    def state_dict(self) -> dict[str, int]:
        """Return the place in the epoch."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a place in the epoch."""
        self.sampler.load_state_dict(state)
