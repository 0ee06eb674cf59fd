from collections.abc import Iterable
from itertools import chain
from typing import Any

import pytest
import torch

from data.batches import Batches, EpochBatches, TrainingBatches, shard_indices
from data.images import DataError


def epoch(order: EpochBatches, number: int) -> list[list[int]]:
    order.set_epoch(number)
    return [indices.tolist() for indices in order]


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    order = EpochBatches(20, 5, seed=3)
    first, second = epoch(order, 0), epoch(order, 1)

    assert sorted(flat(first)) == sorted(flat(second)) == list(range(20))
    assert first != second
    torch.manual_seed(1)
    assert epoch(EpochBatches(20, 5, seed=3), 0) == first == epoch(order, 0)
    assert epoch(EpochBatches(20, 5, seed=4), 0) != first
    # Seed and epoch must not merely be added.
    assert epoch(EpochBatches(20, 5, seed=4), 0) != second


def test_the_rest_is_left_out() -> None:
    order = EpochBatches(23, 5, seed=0)
    batches = epoch(order, 0)
    assert len(order) == len(batches) == 4
    assert [len(batch) for batch in batches] == [5] * 4
    assert len({tuple(sorted(flat(epoch(order, number)))) for number in range(5)}) > 1


def test_processes_have_disjoint_shares() -> None:
    shares = [epoch(EpochBatches(26, 4, seed=0, rank=rank, world_size=3), 2) for rank in range(3)]
    indices = flat(flat(shares))
    assert [len(share) for share in shares] == [2, 2, 2]
    assert len(indices) == len(set(indices)) == 24


@pytest.mark.parametrize(("batch_size", "world_size"), [(21, 1), (11, 2)])
def test_too_large_a_batch(batch_size: int, world_size: int) -> None:
    with pytest.raises(DataError, match="smaller batch size"):
        EpochBatches(20, batch_size, seed=0, world_size=world_size)


def test_the_epoch_is_read_at_the_first_batch() -> None:
    order = EpochBatches(20, 5, seed=0)
    expected = epoch(order, 7)
    order.set_epoch(0)
    iterator = iter(order)
    order.set_epoch(7)
    assert [indices.tolist() for indices in iterator] == expected


def test_resuming_goes_on_in_the_middle_of_the_epoch() -> None:
    images = torch.arange(20).unsqueeze(1)
    batches = TrainingBatches(images, EpochBatches(20, 5, seed=0))
    batches.sampler.set_epoch(3)
    expected = [batch.tolist() for batch in batches]
    iterator = iter(batches)
    next(iterator)
    state = batches.state_dict()

    resumed = TrainingBatches(images, EpochBatches(20, 5, seed=0))
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(3)

    assert [batch.tolist() for batch in resumed] == expected[1:]
    assert [batch.tolist() for batch in resumed] == expected


def test_resuming_after_an_epoch_starts_the_next_from_its_beginning() -> None:
    order = EpochBatches(20, 5, seed=0)
    epoch(order, 3)
    resumed = EpochBatches(20, 5, seed=0)
    resumed.load_state_dict(order.state_dict())
    assert epoch(resumed, 4) == epoch(order, 4)


@pytest.mark.parametrize("count", [0, 3, 10, 11])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_cover_each_image_once(count: int, world_size: int) -> None:
    shares = [shard_indices(count, 4, rank, world_size) for rank in range(world_size)]
    batches = [indices for own in shares for indices in own]
    assert all(0 < len(indices) <= 4 for indices in batches)
    assert sorted(flat(indices.tolist() for indices in batches)) == list(range(count))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_no_process_is_left_without_images(rank: int) -> None:
    with pytest.raises(DataError, match="cannot be shared among 3 processes"):
        shard_indices(2, 4, rank, 3)


def test_batches_are_rows() -> None:
    images = torch.arange(10).view(5, 2)
    batches = Batches(images, shard_indices(5, 2))
    assert len(batches) == 3
    assert torch.equal(torch.cat(list(batches)), images)
