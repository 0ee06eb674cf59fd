"""Compiled kernels: ``torch.compile`` with its options, and matrix products by oneDNN."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from samplers.energy import is_outside

_INDUCTOR = {"realize_reads_threshold": 1, "realize_opcount_threshold": 4}
# Otherwise the compiler inlines the recurrence of elementwise energies, and takes minutes.
_COMPILATIONS = 256
# Of a function that the compiler keeps: its own 8 are soon spent on batch sizes and kernels.
_SMALLEST = 4_000_000
"""Multiplications below which a product is not worth a call of oneDNN."""

Function = Callable[..., Any]


@cache
def compiler_works(device: str) -> bool:
    """Try whether ``torch.compile`` works on a type of device; it takes seconds the first time."""
    try:
        torch.compile(torch.exp, fullgraph=True)(torch.zeros(8, device=device))
    except Exception:  # what is missing decides what is raised: compiler, headers, Triton
        return False
    return True


def compiler(device: str, options: dict[str, Any]) -> Callable[[Function], Function]:
    """Return what compiles functions, each of them once, for 256 shapes and kernels rather than 8.

    Arguments:
        device: The type of device that the kernel is on.
        options: Of ``torch.compile``.
    """
    if not options.keys() & {"backend", "mode", "options"}:
        options = options | {"options": _inductor_options(device)}
    options = {"fullgraph": True, "dynamic": False} | options
    with_room = torch._dynamo.config.patch(recompile_limit=_COMPILATIONS)

    @cache
    def compiled(function: Function) -> Function:
        code = with_room(torch.compile(function, **options))

        def run(*arguments: Any) -> Any:
            try:
                return code(*arguments)
            except (RuntimeError, ValueError) as error:
                if not is_outside(error):
                    raise
            return function(*arguments)  # which finds out for which rows

        return run

    return compiled


@cache
def _inductor_options(device: str) -> dict[str, Any]:
    """Return the compiler's options: one object, as kernels share code compiled with equal ones."""
    if not onednn_is_faster(device):
        return _INDUCTOR
    # Here, since it loads the compiler.
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class ProductsByOneDNN(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            products_by_onednn(graph)

        def uuid(self) -> object:  # compiled code is cached as long as this file stays as it is
            return get_hash_for_files((__file__,))

    return {**_INDUCTOR, "post_grad_custom_pre_pass": ProductsByOneDNN()}


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


_library = torch.library.Library("samplers", "DEF")
_library.define("product(Tensor a, Tensor b) -> Tensor", tags=(torch.Tag.flexible_layout,))


@torch.library.impl(_library, "product", "CPU")
def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of (M, K) and (K, N), float32, by oneDNN and without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


@torch.library.impl(_library, "product", "Meta")
def _like(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def detached_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows weightᵀ + bias, (M, N), by the faster library; oneDNN's has no gradient.

    In a compiled region that is for :func:`products_by_onednn` to choose.
    """
    compiled = torch.compiler.is_compiling()
    if compiled or not (onednn_is_faster(rows.device.type) and _is_large(rows, len(weight))):
        return torch.nn.functional.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def products_by_onednn(graph: fx.Graph) -> None:
    """Have the compiler's graph take its larger float32 products by :func:`product`.

    The numbers are those of float32 as before, up to the order of summation.
    """
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.mm.default and _worth_it(*node.args):
            node.target = torch.ops.samplers.product.default
        elif node.target is torch.ops.aten.addmm.default and _worth_it(*node.args[1:]):
            _take_apart(node)


def _is_large(rows: Tensor, columns: int) -> bool:
    """Say whether the product of rows (M, K) with a matrix (K, columns) is worth oneDNN."""
    return rows.dtype == torch.float32 and rows.numel() * columns >= _SMALLEST


def _worth_it(a: fx.Node, b: fx.Node) -> bool:
    rows: Tensor = a.meta["val"]
    return rows.is_cpu and _is_large(rows, b.meta["val"].shape[1])


def _take_apart(node: fx.Node) -> None:
    # The compiler fuses the sum of β c + α (a b) with whatever comes next.
    added: Any
    a: Any
    added, a, b = node.args
    graph, aten = node.graph, torch.ops.aten
    with graph.inserting_before(node):
        total = _append(graph, torch.ops.samplers.product.default, a, b)
        if (alpha := node.kwargs.get("alpha", 1)) != 1:
            total = _append(graph, aten.mul.Tensor, total, alpha)
        if (beta := node.kwargs.get("beta", 1)) != 1:
            added = _append(graph, aten.mul.Tensor, added, beta)
        node.replace_all_uses_with(_append(graph, aten.add.Tensor, total, added))
    graph.erase_node(node)


def _append(graph: fx.Graph, target: Function, *arguments: Any) -> fx.Node:
    node = graph.call_function(target, arguments)
    values = [each.meta["val"] if isinstance(each, fx.Node) else each for each in arguments]
    node.meta["val"] = target(*values)
    return node
