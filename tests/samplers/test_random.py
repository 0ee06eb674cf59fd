import itertools

import pytest
import torch

from samplers import seeded_generator


def first_numbers(*key: int) -> tuple[float, ...]:
    return tuple(torch.rand(4, generator=seeded_generator("cpu", *key)).tolist())


def test_stream_is_a_function_of_the_key_alone() -> None:
    expected = first_numbers(3, 1, 4)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert first_numbers(3, 1, 4) == expected
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("key", "other"),
    [((0, 1), (1, 0)), ((1,), (1, 0)), ((), (0,)), ((5, 6), (6, 5)), ((0, 0), (0, 0, 0))],
)
def test_order_and_length_of_the_key_matter(key: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert first_numbers(*key) != first_numbers(*other)


def test_nearby_keys_do_not_share_their_numbers() -> None:
    streams = {first_numbers(*key) for key in itertools.product(range(10), repeat=3)}
    assert len(streams) == 1000


@pytest.mark.parametrize("key", [(-1,), (0, -1), (3, -2, 5)])
def test_negative_keys_are_refused(key: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a random key must be"):
        seeded_generator("cpu", *key)
