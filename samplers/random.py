"""Random numbers as a function of integers, so that a resumed run repeats the uninterrupted one."""

import numpy as np
import torch
from torch import Tensor


def seeded_generator(device: torch.device | str, *key: int) -> torch.Generator:
    r"""Return a generator whose stream is a function of the integers in ``key`` alone.

    Keys of integers below 2³² that differ in any give independent streams: they are mixed by
    :class:`numpy.random.SeedSequence` rather than added, so that (seed 0, step 1) and
    (seed 1, step 0) do not share their numbers. Larger ones count as several words of 32 bits.

    Arguments:
        device: Where the numbers will be drawn.
        key: Non-negative integers, for example (seed, stream, global step, rank).

    Raises:
        ValueError: An integer is negative.
    """
    return torch.Generator(device=device).manual_seed(mixed_seed(*key))


def mixed_seed(*key: int) -> int:
    """Return one seed, below 2⁶³, that is a function of all the integers in ``key``.

    Raises:
        ValueError: An integer is negative.
    """
    if any(part < 0 for part in key):
        raise ValueError(f"a random key must be non-negative integers, got {key}")
    # SeedSequence pads with zeros, so without the length (1,) and (1, 0) would be the same key.
    mixed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return int(mixed >> np.uint64(1))


def standard_normal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw N(0, 1) numbers of the shape, type and device of ``like``."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
