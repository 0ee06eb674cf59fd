"""Random streams by seed and name, so that a resumed run repeats the uninterrupted one."""

import hashlib

import numpy as np
import torch
from torch import Tensor


def seeded_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    r"""Return a generator whose stream is a function of the key alone.

    Keys that differ anywhere give independent streams: their parts are mixed by
    :class:`numpy.random.SeedSequence` rather than added, so that (seed 0, step 1) and
    (seed 1, step 0) do not share their numbers.

    Arguments:
        device: Where the numbers will be drawn.
        key: Non-negative integers, and the name of what is drawn, for example
            (seed, "ais.pilot", global step, rank).

    Raises:
        ValueError: An integer is negative.
    """
    return torch.Generator(device=device).manual_seed(mixed_seed(*key))


def mixed_seed(*key: int | str) -> int:
    """Return one seed, below 2⁶³, that is a function of the whole key of integers and names.

    Raises:
        ValueError: An integer is negative.
    """
    numbers = [_number(part) if isinstance(part, str) else part for part in key]
    if any(part < 0 for part in numbers):
        raise ValueError(f"a random key must be non-negative integers and names, got {key}")
    # SeedSequence pads with zeros, so without the length (1,) and (1, 0) would be the same key.
    mixed = np.random.SeedSequence((len(key), *numbers)).generate_state(1, np.uint64)[0]
    return int(mixed >> np.uint64(1))


def _number(name: str) -> int:
    """Return a number of 128 bits, the same in every process, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])


def random_state(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Return the state of a generator; without one, of torch's global generator of the device."""
    if generator is not None:
        return generator.get_state()
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def standard_normal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw N(0, 1) numbers of the shape, type and device of ``like``."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
