"""Products by oneDNN, called or compiled: the numbers are those of before."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from samplers import HMC, seeded_generator
from samplers.compiling import (
    _inductor_options,
    compiler_works,
    detached_linear,
    onednn_is_faster,
    product,
    products_by_onednn,
)

PRODUCT = torch.ops.samplers.product.default

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded_generator("cpu", seed), dtype=dtype)


@pytest.mark.parametrize("transposed", ["neither", "first", "second", "both"])
def test_a_product_is_that_of_float64_to_rounding(transposed: str) -> None:
    a, b = normal(200, 300), normal(300, 100, seed=1)
    if transposed in ("first", "both"):
        a = a.T.contiguous().T
    if transposed in ("second", "both"):
        b = b.T.contiguous().T
    exact = a.double() @ b.double()
    error = (product(a, b) - exact).abs().max() / exact.abs().max()
    assert error < 300 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("bias", [None, normal(200, seed=2)], ids=["without", "with"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_by_onednn_is_that_of_float64_to_rounding(
    transposed: bool, bias: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samplers.compiling.onednn_is_faster", lambda device: True)
    rows, weight = normal(200, 300), normal(200, 300, seed=1)
    if transposed:
        weight = weight.T.contiguous().T
    with torch.profiler.profile(acc_events=True) as profile:
        found = detached_linear(rows, weight, bias)
    assert "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}
    exact = rows.double() @ weight.T.double() + (0 if bias is None else bias)
    assert (found - exact).abs().max() < 300 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("rows", "dtype", "faster"),
    [(2, torch.float32, True), (200, torch.float64, True), (200, torch.float32, False)],
)
def test_other_layers_stay(
    rows: int, dtype: torch.dtype, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samplers.compiling.onednn_is_faster", lambda device: faster)
    arguments = normal(rows, 200, dtype=dtype), normal(200, 200, seed=1, dtype=dtype)
    with torch.profiler.profile(acc_events=True) as profile:
        found = detached_linear(*arguments)
    assert "mkldnn::_linear_pointwise" not in {event.key for event in profile.key_averages()}
    assert torch.equal(found, torch.nn.functional.linear(*arguments))


@pytest.mark.parametrize(
    ("device", "capability", "cpuinfo", "expected"),
    [
        ("cpu", "AVX512", "vendor_id : AuthenticAMD", True),
        ("cpu", "AVX512", "vendor_id : GenuineIntel", False),
        ("cpu", "AVX2", "vendor_id : AuthenticAMD", False),
        ("cpu", "AVX512", None, False),
        ("cuda", "AVX512", "vendor_id : AuthenticAMD", False),
    ],
)
def test_onednn_is_for_processors_of_amd_with_avx512(
    device: str,
    capability: str,
    cpuinfo: str | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_text(path: Path) -> str:
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert onednn_is_faster.__wrapped__(device) is expected  # past its cache


def replaced(graph: fx.Graph) -> int:
    return sum(node.target is PRODUCT for node in graph.nodes)


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (-1, 1), (1, 2), (-1, -1), (0.5, 3)])
def test_the_graph_with_products_computes_the_same(beta: float, alpha: float) -> None:
    def work(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha).tanh() @ b.T

    arguments = normal(200), normal(200, 150, seed=1), normal(150, 200, seed=2)
    graph_module = make_fx(work, tracing_mode="fake")(*arguments)
    products_by_onednn(graph_module.graph)
    graph_module.graph.lint()
    graph_module.recompile()
    assert replaced(graph_module.graph) == 2
    torch.testing.assert_close(graph_module(*arguments), work(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "dtype"), [(2, torch.float32), (200, torch.float64)])
def test_small_or_precise_products_stay(rows: int, dtype: torch.dtype) -> None:
    arguments = normal(rows, 200, dtype=dtype), normal(200, 200, dtype=dtype)
    graph = make_fx(torch.mm, tracing_mode="fake")(*arguments).graph
    products_by_onednn(graph)
    assert replaced(graph) == 0


def test_a_kernel_compiled_with_products_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler_works("cpu"):
        pytest.skip("torch.compile does not run here")
    monkeypatch.setattr("samplers.compiling.onednn_is_faster", lambda device: True)
    torch.compiler.reset()
    _inductor_options.cache_clear()
    weights = normal(200, 200) / 200**0.5
    bias = normal(200, seed=3)

    def energy(z: Tensor) -> Tensor:
        return torch.nn.functional.softplus(torch.addmm(bias, z, weights)).sum(-1) + 0.5 * (
            z.square().sum(-1)
        )

    def run(kernel: HMC) -> Tensor:
        state = kernel.init(normal(200, 200, seed=1), energy)
        noise = kernel.noise(state, seeded_generator("cpu", 2))
        after, _ = kernel.step(state, energy, noise)
        return after.position

    compiled, another, eager = (HMC(1, 0.1) for _ in range(3))
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
    assert calls.get("samplers::product") == 2  # forward and backward of a leapfrog
