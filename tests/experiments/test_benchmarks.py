"""The benchmarks at sizes that take seconds; their figures are not looked at, their sums are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import __main__ as command
from experiments.benchmarks.cases import SamplerUpdate, Sizes
from experiments.benchmarks.gpu import energy_error, gpu
from experiments.benchmarks.memory import memory, peak_memory
from experiments.benchmarks.products import products_of, replay
from experiments.benchmarks.published import PublishedL2HMC
from experiments.benchmarks.scaling import scaling
from experiments.benchmarks.startup import startup
from experiments.benchmarks.training_profile import SelfTimes, training_profile
from experiments.command import CommandError
from samplers import HMC, L2HMC, Kernel

Arguments = Callable[..., list[str]]

GROWING = ("chains", "MH steps", "leapfrogs", "latent dimensions")
HOW = ("eager", "compiled")
TINY = Sizes(6, 3, (12,), 2, 2, 8, (8,))
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux"
)


def test_results_are_shown_and_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"title": "a title", "rows": [{"contender": "ours", "seconds": 1.5}], "note": "a note"}
    monkeypatch.setitem(command.BENCHMARKS, "w2", [lambda: result])
    output = tmp_path / "results.json"
    command.main(["w2", "--output", str(output)])
    written = json.loads(output.read_text())
    assert written["results"] == [{"benchmark": "w2", **result}]
    assert {"torch", "threads", "device"} <= written["machine"].keys()
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("w2: a title", "ours", "1.5", "a note"))
    with pytest.raises(CommandError, match="exists already"):
        command.main(["w2", "--output", str(output)])


def test_startup_times_real_commands(small: Arguments) -> None:
    options = small(None, trainer__max_steps=100)
    eager = startup(options, updates=3, compile=("false",))["rows"]
    assert [row["training"] for row in eager] == ["--compile false"]
    assert 0 < eager[0]["later_updates_seconds"] < eager[0]["first_update_seconds"]


def test_startup_says_that_the_training_failed() -> None:
    with pytest.raises(CommandError, match="exit status 1"):
        startup(["--data.name", "no such data"], updates=1, compile=("false",))


def test_the_parts_of_a_profile_make_up_the_whole(small: Arguments) -> None:
    options = small(None, trainer__max_steps=8)
    result = training_profile(options)
    shares = {row["part"]: row["share"] for row in result["rows"]}
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0
    inside = shares["chain"] + shares["encoder and decoder"] + shares["backward through all three"]
    assert result["inside_share"] == pytest.approx(inside)
    step = inside + shares["optimizer"]
    assert result["overhead"] == pytest.approx(1 / step - 1)
    data = shares["data path: rows, transfer, binarization"]
    assert result["data_overhead"] == pytest.approx(data / step)


def test_an_action_does_not_count_what_lies_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 11.0, 20.0, 22.0, 25.0, 30.0, 40.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    profiler = SelfTimes()
    with profiler.profile("epoch"):
        with profiler.profile("run_training_batch"):
            pass
        with profiler.profile("outer"), profiler.profile("inner"):
            pass
    assert profiler.seconds == {"inner": 3.0, "outer": 7.0, "epoch": 19.0}
    assert profiler.total == 29.0


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
    # Beside the first, which is taken by hand.
    assert taken == [leapfrogs, 4 * leapfrogs + energies]


def test_the_products_of_some_work_are_those_forward_and_backward() -> None:
    layer, x = torch.nn.Linear(3, 4), torch.randn(5, 3, requires_grad=True)
    shapes = products_of(lambda: layer(x).sum().backward())
    assert sorted(shapes) == [(4, 5, 3), (5, 3, 4), (5, 4, 3)]
    assert products_of(replay(shapes)) == shapes


def test_the_decoders_products_are_most_of_an_update() -> None:
    update = SamplerUpdate(TINY)
    shapes = products_of(update)
    decoders = [shape for shape in shapes if 784 in shape and 6 == shape[0]]
    # One forward and one backward a gradient, and as many again to second order; by the last
    # layer, and by the first one of the embedding, whose input needs no gradient.
    assert len(decoders) == 2 * (2 * TINY.gradients - 1) + 1


def test_scaling_multiplies_each_size() -> None:
    rows = scaling(TINY, factors=(1, 3), compile=False, repeats=1)["rows"]
    sizes = {name: [row["size"] for row in rows if row["growing"] == name] for name in GROWING}
    assert list(sizes.values()) == [[6, 18], [2, 6], [2, 6], [3, 9]]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["time_ratio"] == 1
        assert second["time_ratio"] == pytest.approx(second["seconds"] / first["seconds"])
    # 18 rows of 2 × 2 + 1 gradients.
    assert rows[1]["microseconds_a_gradient"] == pytest.approx(1e6 * rows[1]["seconds"] / 90)


@linux
def test_the_peak_is_that_of_the_work_beyond_what_is_held() -> None:
    held = torch.ones(2**24)  # 64 MiB
    assert peak_memory(lambda: held.clone().exp()) == pytest.approx(128, rel=0.1)
    assert peak_memory(lambda: held.sum()) < 8


@linux
def test_the_memory_of_a_longer_chain_is_its_own_figure() -> None:
    rows = memory([TINY], ways=["eager"], lengths=[4, 8])["rows"]
    assert [row["work"].split(",")[-1].strip() for row in rows] == [
        "eager",
        "64 chains of 4 HMC steps",
        "64 chains of 8 HMC steps",
    ]
    assert max(row["peak_mebibytes"] for row in rows) < 64


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    output = tmp_path / "results.json"
    with pytest.raises(CommandError, match="no CUDA GPU here"):
        command.main(["gpu", "--output", str(output)])
    assert not output.exists()


@linux
def test_the_benchmark_for_a_gpu_runs_on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(Kernel, "compile", lambda kernel: compiled.append(type(kernel)))
    result = gpu("cpu", TINY, TINY, square=64)
    assert compiled == [L2HMC, HMC] * 2
    works = [row["work"] for row in result["rows"]]
    assert works[:4] == [f"{name}, {how}, fp32" for how in HOW for name in ("update", "AIS")]
    first, second = result["rows"][:2]
    assert first["share_of_product_rate"] * first["milliseconds"] == pytest.approx(
        2 * second["share_of_product_rate"] * second["milliseconds"]
    )
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_error_of_an_energy_is_that_of_single_precision() -> None:
    assert 0 < energy_error("cpu", TINY) < 1e-3
