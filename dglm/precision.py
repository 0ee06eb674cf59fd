"""Chains and importance weights in full precision, whatever the Trainer computes the rest in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch

PRECISIONS = ("32-true", "64-true", "bf16-mixed")
"""Those of Lightning's in which chains stay in float32 or float64."""


def check_precision(precision: str) -> None:
    """Raise ValueError for a precision that would reach chains and importance weights."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision {precision} is too low for exact chains; choose {', '.join(PRECISIONS)} "
            "(bf16-mixed trains encoder and decoder in bfloat16, the rest in float32)"
        )


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in float32 or float64 as they are, also as a decorator.

    No autocasting, and no TF32 or bfloat16 in products and convolutions, whatever was allowed:
    energies in TF32 are off by up to a tenth of a nat, which no Metropolis step corrects.
    """
    before = _settings()
    # By the older functions too, whose getters raise where the newer ones say something else.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for place in _places():  # each of which may have been allowed more than all together
        place.fp32_precision = "ieee"
    try:
        with ExitStack() as stack:
            for device in ("cpu", "cuda", "mps"):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        _restore(before)


class _Settings(NamedTuple):
    """What a user has allowed, by torch's older functions and by its newer ones.

    The older ones cannot tell where somebody has used the newer, which keep places of their own.
    """

    products: str | None
    convolutions: bool | None
    places: list[str]


def _places() -> list[Any]:
    backends = torch.backends
    return [
        *(backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),  # type: ignore[attr-defined]
        *(backends.mkldnn.matmul, backends.mkldnn.conv),  # type: ignore[attr-defined]
    ]


def _settings() -> _Settings:
    products, convolutions = None, None
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    return _Settings(products, convolutions, [place.fp32_precision for place in _places()])


def _restore(settings: _Settings) -> None:
    if settings.products is not None:
        torch.set_float32_matmul_precision(settings.products)
    if settings.convolutions is not None:
        torch.backends.cudnn.allow_tf32 = settings.convolutions
    for place, value in zip(_places(), settings.places, strict=True):
        place.fp32_precision = value
