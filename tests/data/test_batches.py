from itertools import chain

import pytest
import torch

from data.batches import Batches, EpochBatches, shard_indices
from data.images import DataError


def epoch(order: EpochBatches, number: int) -> list[list[int]]:
    order.set_epoch(number)
    return [indices.tolist() for indices in order]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    order = EpochBatches(20, 5, seed=3)
    first, second = epoch(order, 0), epoch(order, 1)
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(20))
    torch.manual_seed(1)
    assert epoch(EpochBatches(20, 5, seed=3), 0) == first == epoch(order, 0) != second
    # Seed and epoch must not merely be added.
    assert epoch(EpochBatches(20, 5, seed=4), 0) not in (first, second)


def test_processes_have_disjoint_shares_and_the_rest_is_left_out() -> None:
    orders = [EpochBatches(26, 4, seed=0, rank=rank, world_size=3) for rank in range(3)]
    used = []
    for number in range(5):
        shares = [epoch(order, number) for order in orders]
        assert [len(batch) for share in shares for batch in share] == [4] * 6
        used.append(frozenset(chain(*chain(*shares))))
        assert len(used[-1]) == 24
    assert len(orders[0]) == 2
    assert len(set(used)) > 1
    for batch_size, world_size in ((27, 1), (14, 2)):
        with pytest.raises(DataError, match="smaller batch size"):
            EpochBatches(26, batch_size, seed=0, world_size=world_size)


def test_the_epoch_is_read_at_the_first_batch() -> None:
    order = EpochBatches(20, 5, seed=0)
    expected = epoch(order, 7)
    order.set_epoch(0)
    iterator = iter(order)
    order.set_epoch(7)
    assert [indices.tolist() for indices in iterator] == expected


@pytest.mark.parametrize("count", [0, 3, 11])
@pytest.mark.parametrize("world_size", [1, 3])
def test_shares_cover_each_image_once(count: int, world_size: int) -> None:
    images = torch.arange(2 * count).view(count, 2)
    found = []
    for rank in range(world_size):
        batches = Batches(images, shard_indices(count, 4, rank, world_size))
        assert all(0 < len(batch) <= 4 for batch in batches)
        assert len(batches) == len(list(batches))
        found += [*batches]
    assert sorted(chain(*(batch[:, 0].tolist() for batch in found))) == images[:, 0].tolist()


def test_no_process_is_left_without_images() -> None:
    for rank in range(3):
        with pytest.raises(DataError, match="cannot be shared among 3 processes"):
            shard_indices(2, 4, rank, 3)
