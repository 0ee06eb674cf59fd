"""Has the compiler take products by oneDNN; a module of its own, as it loads the compiler."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from samplers import products
from samplers.products import is_large


class ProductsByOneDNN(CustomGraphPass):
    """Has a compiled region take its larger float32 products by ``samplers.products.product``.

    The numbers are those of float32 as before, up to the order of summation.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Replace them in the compiler's graph."""
        for node in list(graph.nodes):
            if node.target is torch.ops.aten.mm.default and _worth_it(*node.args):
                node.target = torch.ops.samplers.product.default
            elif node.target is torch.ops.aten.addmm.default and _worth_it(*node.args[1:]):
                _take_apart(node)

    def uuid(self) -> object:
        """Let compiled code be cached as long as these files stay as they are."""
        return get_hash_for_files((__file__, products.__file__))


def _worth_it(a: fx.Node, b: fx.Node) -> bool:
    rows: Tensor = a.meta["val"]
    return rows.is_cpu and is_large(rows, b.meta["val"].shape[1])


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


def _append(graph: fx.Graph, target: Callable[..., Any], *arguments: Any) -> fx.Node:
    node = graph.call_function(target, arguments)
    values = [each.meta["val"] if isinstance(each, fx.Node) else each for each in arguments]
    node.meta["val"] = target(*values)
    return node


PRODUCTS_BY_ONEDNN = ProductsByOneDNN()
"""One object, as kernels share a compilation only where their options are equal."""
