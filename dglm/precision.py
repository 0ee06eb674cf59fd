"""Chains and importance weights in full precision, whatever the Trainer computes the rest in."""

from collections.abc import Callable
from functools import wraps
from typing import Any

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


def full_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """Switch autocasting off inside a module's method."""

    @wraps(method)
    def precise(self: Any, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *arguments, **options)

    return precise
