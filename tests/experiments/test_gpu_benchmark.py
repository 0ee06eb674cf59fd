"""The benchmark for a GPU, as far as a processor can tell whether it will run on one."""

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dglm import Decoder
from experiments.benchmarks import __main__ as command
from experiments.benchmarks.cases import Annealing, SamplerUpdate, Sizes
from experiments.benchmarks.gpu import agreement, captured, energy_error, gpu
from experiments.shared.cli import CommandError
from samplers import HMC, L2HMC, Kernel

HOW = ("eager", "compiled")
TINY = Sizes(6, 3, (12,), 2, 2, 8, (8,))


class Mixed(TorchDispatchMode):
    """Collects the operations on tensors of two devices, copies between them included."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        if len({leaf.device for leaf in leaves if isinstance(leaf, Tensor)}) > 1:
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("kind", [SamplerUpdate, Annealing])
def test_the_work_never_leaves_the_device(kind: type[SamplerUpdate | Annealing]) -> None:
    # Tensors of the device "meta" have no numbers: reading one, as .item() does, fails.
    work = kind(TINY, device="meta")
    with Mixed() as mixed:
        assert work(torch.Generator()).device.type == "meta"
    assert mixed.found == []


def test_no_backward_node_outlives_an_update() -> None:
    # One of an update on another stream would make the backward pass of a capture wait for it.
    update = SamplerUpdate(TINY)
    marked = []

    def mark(*arguments: object) -> None:
        kept = update.kernel.log_step_size.expand(1)
        kept.grad_fn.next_functions[0][0].metadata["marked"] = True
        marked.append(kept)

    update.kernel.embedding.register_forward_hook(mark)
    update()
    marked.clear()
    node = update.kernel.log_step_size.expand(1).grad_fn.next_functions[0][0]
    assert "marked" not in node.metadata


def test_the_memory_of_a_graph_is_that_of_its_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, peak = MagicMock(), [5 * 2**20]
    monkeypatch.setattr(torch, "cuda", cuda)
    cuda.memory_allocated.return_value = 2**20
    cuda.max_memory_allocated.side_effect = lambda: peak[0]
    cuda.reset_peak_memory_stats.side_effect = lambda: peak.append(peak.pop() and 2**20)

    def work(generator: object) -> None:
        peak[0] = max(peak[0], 4 * 2**20)

    replay, memory = captured(work)
    assert replay is cuda.CUDAGraph().replay
    assert memory == 3


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    output = tmp_path / "results.json"
    with pytest.raises(CommandError, match="no CUDA GPU here"):
        command.main(["gpu", "--output", str(output)])
    assert not output.exists()


def test_the_benchmark_for_a_gpu_runs_on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(Kernel, "compile", lambda kernel: compiled.append(type(kernel)))
    result = gpu("cpu", TINY, TINY, square=64)
    assert compiled == [L2HMC, HMC] * 3
    assert result["device"] == "cpu"
    assert "agree in fp32 to a relative {'loss and gradient norm': 0.0, 'log" in result["note"]
    works = [row["work"] for row in result["rows"]]
    assert works[:4] == [f"{name}, {how}, fp32" for how in HOW for name in ("update", "AIS")]
    first, second = result["rows"][:2]
    # Five gradients, and with the first no Hessian-vector product.
    assert 5 * first["share_of_product_rate"] * first["milliseconds"] == pytest.approx(
        9 * second["share_of_product_rate"] * second["milliseconds"]
    )
    assert torch.get_float32_matmul_precision() == "highest"


def test_compiled_work_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "compile", lambda kernel: kernel.log_step_size.data.fill_(0))
    with pytest.raises(RuntimeError, match="loss and gradient norm differs"):
        agreement("cpu", TINY, TINY)


def test_the_error_of_an_energy_is_that_of_single_precision_at_logits_of_a_trained_decoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spread, forward = [], Decoder.forward

    def recorded(decoder: Decoder, z: Tensor) -> Tensor:
        spread.append(forward(decoder, z).std())
        return forward(decoder, z)

    monkeypatch.setattr(Decoder, "forward", recorded)
    assert 0 < energy_error("cpu", TINY) < 1e-3
    assert [float(std) for std in spread[-2:]] == pytest.approx([4, 4], rel=0.01)
