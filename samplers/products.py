"""Matrix products by oneDNN, on processors that torch's BLAS uses half of."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SMALLEST = 4_000_000
"""Multiplications below which a product is not worth a call of oneDNN."""

_library = torch.library.Library("samplers", "DEF")
_library.define("product(Tensor a, Tensor b) -> Tensor", tags=(torch.Tag.flexible_layout,))


@torch.library.impl(_library, "product", "CPU")
def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of (M, K) and (K, N), float32, by oneDNN and without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


@torch.library.impl(_library, "product", "Meta")
def _like(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@cache
def onednn_is_faster(device: str) -> bool:
    """Say whether MKL, torch's BLAS, leaves AVX-512 aside here, as it does on processors of AMD."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def detached_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows weightᵀ + bias, (M, N), by the faster library; oneDNN's has no gradient.

    In a compiled region that is for :class:`samplers.graph_pass.ProductsByOneDNN` to choose.
    """
    compiled = torch.compiler.is_compiling()
    if compiled or not (onednn_is_faster(rows.device.type) and is_large(rows, len(weight))):
        return torch.nn.functional.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def is_large(rows: Tensor, columns: int) -> bool:
    """Say whether the product of rows (M, K) with a matrix (K, columns) is worth oneDNN."""
    return rows.dtype == torch.float32 and rows.numel() * columns >= _SMALLEST
