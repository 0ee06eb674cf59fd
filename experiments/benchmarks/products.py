"""The matrix products that some work takes, without the rest of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from samplers.products import detached_linear

Shape = tuple[int, int, int]
"""M, K and N of a product of (M, K) and (K, N)."""


def products_of(work: Callable[[], object]) -> list[Shape]:
    """Do some eager work once; return the matrix products that it takes, forward and backward."""
    recorder = _Recorder()
    with recorder:
        work()
    return recorder.shapes


def replay(shapes: list[Shape]) -> Callable[[], None]:
    """Return products of these shapes, each by the library that is faster at it."""
    factors = {
        (rows, inner, columns): (torch.randn(rows, inner), torch.randn(columns, inner))
        for rows, inner, columns in set(shapes)
    }

    @torch.no_grad()
    def work() -> None:
        for shape in shapes:
            detached_linear(*factors[shape])

    return work


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Shape] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        if function in (aten.mm.default, aten.addmm.default):
            left, right = args[-2:]
            self.shapes.append((*left.shape, right.shape[1]))
        elif function is torch.ops.mkldnn._linear_pointwise.default:
            rows, weight = args[:2]
            self.shapes.append((*rows.shape, len(weight)))
        return function(*args, **(kwargs or {}))
