"""Chains and importance weights in full precision, whatever the Trainer computes the rest in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with ExitStack() as stack:
            for device in ("cpu", "cuda", "mps"):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
