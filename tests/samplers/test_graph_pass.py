"""Compiled products by oneDNN: the numbers are those of before."""

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from samplers import HMC, seeded_generator
from samplers.graph_pass import ProductsByOneDNN
from samplers.kernel import compiler_works

PRODUCT = torch.ops.samplers.product.default
pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded_generator("cpu", seed), dtype=dtype)


def replaced(graph: fx.Graph) -> int:
    return sum(node.target is PRODUCT for node in graph.nodes)


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (-1, 1), (1, 2), (-1, -1), (0.5, 3)])
def test_the_graph_with_products_computes_the_same(beta: float, alpha: float) -> None:
    def work(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha).tanh() @ b.T

    arguments = normal(200), normal(200, 150, seed=1), normal(150, 200, seed=2)
    graph_module = make_fx(work, tracing_mode="fake")(*arguments)
    ProductsByOneDNN()(graph_module.graph)
    graph_module.graph.lint()
    graph_module.recompile()
    assert replaced(graph_module.graph) == 2
    torch.testing.assert_close(graph_module(*arguments), work(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "dtype"), [(2, torch.float32), (200, torch.float64)])
def test_small_or_precise_products_stay(rows: int, dtype: torch.dtype) -> None:
    arguments = normal(rows, 200, dtype=dtype), normal(200, 200, dtype=dtype)
    graph = make_fx(torch.mm, tracing_mode="fake")(*arguments).graph
    ProductsByOneDNN()(graph)
    assert replaced(graph) == 0


def test_a_kernel_compiled_with_products_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler_works("cpu"):
        pytest.skip("torch.compile does not run here")
    monkeypatch.setattr("samplers.kernel.onednn_is_faster", lambda device: True)
    torch.compiler.reset()
    weights = normal(200, 200) / 200**0.5
    bias = normal(200, seed=3)

    def energy(z: Tensor) -> Tensor:
        return torch.nn.functional.softplus(torch.addmm(bias, z, weights)).sum(-1) + 0.5 * (
            z.square().sum(-1)
        )

    def run(kernel: HMC) -> Tensor:
        state = kernel.init(normal(200, 200, seed=1), energy)
        noise = kernel.noise(state, seeded_generator("cpu", 2))
        [(after, _)] = kernel(state, energy, [noise])
        return after.position

    compiled, another, eager = (HMC(2, 0.1) for _ in range(3))
    compiled.compile()
    another.compile()
    with torch.no_grad():
        run(compiled)
        with torch._dynamo.config.patch(error_on_recompile=True):
            run(another)
        with torch.profiler.profile(acc_events=True) as profile:
            found = run(compiled)
        torch.testing.assert_close(found, run(eager), rtol=1e-4, atol=1e-4)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls.get("samplers::product") == 4  # forward and backward of two leapfrogs
