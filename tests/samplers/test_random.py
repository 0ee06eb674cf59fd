import itertools

import pytest
import torch

from samplers import seeded_generator
from samplers.random import standard_normal


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


def test_streams_of_successive_steps_are_uncorrelated() -> None:
    first_draws = torch.tensor([first_numbers(0, step)[0] for step in range(2000)])
    correlation = torch.corrcoef(torch.stack([first_draws[:-1], first_draws[1:]]))[0, 1]
    assert abs(first_draws.mean() - 0.5) < 5 / (12 * 2000) ** 0.5
    assert abs(correlation) < 5 / 2000**0.5


@pytest.mark.parametrize("key", [(-1,), (0, -1), (3, -2, 5)])
def test_negative_keys_are_refused(key: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="non-negative"):
        seeded_generator("cpu", *key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_numbers_take_shape_and_type_of_their_model(dtype: torch.dtype) -> None:
    like = torch.empty(3, 2, dtype=dtype)
    drawn = standard_normal(like, seeded_generator("cpu", 0))
    assert drawn.shape == like.shape
    assert drawn.dtype == dtype
    assert torch.equal(drawn, standard_normal(like, seeded_generator("cpu", 0)))
