"""Products by oneDNN: the numbers are those of before."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from samplers import seeded_generator
from samplers.products import detached_linear, onednn_is_faster, product

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
    monkeypatch.setattr("samplers.products.onednn_is_faster", lambda device: True)
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
    monkeypatch.setattr("samplers.products.onednn_is_faster", lambda device: faster)
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
