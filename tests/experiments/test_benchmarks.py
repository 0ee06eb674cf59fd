"""The benchmarks at sizes that take seconds; their figures are not looked at, their sums are."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from experiments.benchmarks import peer, workloads
from experiments.benchmarks.cases import PRODUCTS, Annealing, Posterior, SamplerUpdate, Sizes
from experiments.benchmarks.gpu import agreement, captured, energy_error, gpu
from experiments.benchmarks.published import PublishedL2HMC
from experiments.benchmarks.scaling import scaling
from experiments.benchmarks.timing import Workload, agree, compare
from experiments.benchmarks.workloads import annealing, posterior, sampler_update
from experiments.shared.cli import CommandError
from samplers import HMC, L2HMC, Kernel

HOW = ("eager", "compiled")
GROWING = ("chains", "MH steps", "leapfrogs", "latent dimensions")
TINY = Sizes(6, 3, (12,), 2, 2, 8, (8,))


def test_results_are_shown_and_written_once_and_outlive_the_failure_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"title": "a title", "rows": [{"contender": "ours", "seconds": 1.5}], "note": "a note"}
    monkeypatch.setitem(command.BENCHMARKS, "w2", [lambda: result, lambda: 1 / 0])
    output = tmp_path / "new" / "results.json"
    with pytest.raises(ZeroDivisionError):
        command.main(["w2", "--output", str(output)])
    written = json.loads(output.read_text())
    assert written["results"] == [{"benchmark": "w2", **result}]
    assert {"torch", "threads", "processor", "gpu"} <= written["machine"].keys()
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("w2: a title", "ours", "1.5", "a note"))
    # Neither of these benchmarks is begun.
    for name, message in ((output, "exists already"), (output / "other.json", "cannot write")):
        with pytest.raises(CommandError, match=message):
            command.main(["w2", "--output", str(name)])


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Kernel, "compile", lambda kernel, steps=1: setattr(kernel, "steps_per_call", steps)
    )
    monkeypatch.setattr(peer, "INSTALLED", False)
    monkeypatch.setattr(workloads, "_CHAINS", 4)
    monkeypatch.setattr(workloads, "_STEPS", 10)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "w1": workloads.small_target,
    "w2": partial(posterior, TINY),
    "w3": partial(annealing, TINY),
    "w4": partial(sampler_update, TINY),
}


def contenders(build: Callable[[], Workload]) -> list[str]:
    rows = compare(lambda: replace(build(), repeats=2))["rows"]
    assert min(row["speed_ratio"] for row in rows) > 0
    # By torch.mm, where oneDNN's products are faster.
    return sorted(row["contender"] for row in rows if not row["contender"].endswith("torch.mm"))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", WORKLOADS)
def test_the_contenders_do_the_same_work(name: str) -> None:
    others = {"w1": [], "w4": [PRODUCTS, "as published"]}.get(name, [PRODUCTS])
    assert contenders(WORKLOADS[name]) == sorted(["compiled", "eager", *others])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["w1", "w2", "w4"])
def test_contenders_that_do_other_work_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(kernel: Kernel, steps: int = 1) -> None:
        kernel.steps_per_call = steps
        kernel.log_step_size.data.fill_(0)

    monkeypatch.setattr(Kernel, "compile", spoil)
    with pytest.raises(RuntimeError, match="differs"):
        WORKLOADS[name]()


@pytest.mark.usefixtures("uncompiled")
def test_the_floor_of_an_update_is_all_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        Posterior, "products", lambda case, gradients: {PRODUCTS: lambda: asked.append(gradients)}
    )
    sampler_update(TINY).contenders[PRODUCTS]()
    # Five gradients, and with the first no Hessian-vector product.
    assert asked == [9]


def test_a_difference_is_relative_to_the_largest_number() -> None:
    first, second = torch.tensor([8.0, 0.5]), torch.tensor([8.0, 1.3])
    assert agree("x", first, second, 0.2) == {"x": pytest.approx(0.1)}
    for bound, other in ((0.05, second), (0.2, torch.full((2,), torch.nan))):
        with pytest.raises(RuntimeError, match="x differs"):
            agree("x", first, other, bound)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["w1", "w2"])
def test_blackjax_does_the_same_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("blackjax")
    monkeypatch.setattr(peer, "INSTALLED", True)
    assert "blackjax" in contenders(WORKLOADS[name])


def test_the_published_scheme_computes_the_same_update() -> None:
    ours, published = (SamplerUpdate(TINY, kernel_class=kind) for kind in (L2HMC, PublishedL2HMC))
    torch.testing.assert_close(published(), ours(), rtol=1e-5, atol=0)
    pairs = zip(published.kernel.parameters(), ours.kernel.parameters(), strict=True)
    for theirs, own in pairs:
        torch.testing.assert_close(theirs.grad, own.grad, rtol=1e-3, atol=1e-6)


def test_the_published_scheme_takes_twice_the_gradients_twice() -> None:
    taken = []
    for kind in (L2HMC, PublishedL2HMC):
        update, counted = SamplerUpdate(TINY, kernel_class=kind), []
        update.case.model.decoder.output.register_forward_hook(
            lambda *arguments, counted=counted: counted.append(1)
        )
        update()
        taken.append(len(counted))
    leapfrogs = TINY.mh_steps * TINY.leapfrogs
    energies = 4 * TINY.mh_steps
    # And the first, of the chain's start; with its hook the decoder is left to autograd.
    assert taken == [1 + leapfrogs, 1 + 4 * leapfrogs + energies]


def test_scaling_multiplies_each_size() -> None:
    rows = scaling(TINY, factors=(1, 3), compile=False, repeats=1)["rows"]
    sizes = {name: [row["size"] for row in rows if row["growing"] == name] for name in GROWING}
    assert list(sizes.values()) == [[6, 18], [2, 6], [2, 6], [3, 9]]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["time_ratio"] == 1
        assert second["time_ratio"] == pytest.approx(second["seconds"] / first["seconds"])
    # 18 rows of 2 × 2 + 1 gradients.
    assert rows[1]["microseconds_a_gradient"] == pytest.approx(1e6 * rows[1]["seconds"] / 90)


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
