"""The benchmarks at sizes that take seconds; their figures are not looked at, their sums are."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import __main__ as command
from experiments.benchmarks import chains, peer
from experiments.benchmarks.cases import PRODUCTS, Posterior, SamplerUpdate, Sizes
from experiments.benchmarks.decoders import annealing, posterior, sampler_update
from experiments.benchmarks.memory import memory, peak_memory
from experiments.benchmarks.products import products_of, replay
from experiments.benchmarks.published import PublishedL2HMC
from experiments.benchmarks.scaling import scaling
from experiments.benchmarks.startup import startup
from experiments.benchmarks.timing import Workload, agree, compare
from experiments.benchmarks.training_profile import SelfTimes, training_profile
from experiments.shared.cli import CommandError
from samplers import L2HMC, Kernel

Arguments = Callable[..., list[str]]

GROWING = ("chains", "MH steps", "leapfrogs", "latent dimensions")
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
    assert {"torch", "threads", "processor", "gpu"} <= written["machine"].keys()
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("w2: a title", "ours", "1.5", "a note"))
    with pytest.raises(CommandError, match="exists already"):
        command.main(["w2", "--output", str(output)])


def test_results_of_a_benchmark_outlive_the_failure_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {"title": "a title", "rows": [{"seconds": 1.5}], "note": "a note"}
    monkeypatch.setitem(command.BENCHMARKS, "w2", [lambda: result, lambda: 1 / 0])
    output = tmp_path / "new" / "results.json"
    with pytest.raises(ZeroDivisionError):
        command.main(["w2", "--output", str(output)])
    assert json.loads(output.read_text())["results"] == [{"benchmark": "w2", **result}]


def test_the_output_is_tried_before_the_first_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(command.BENCHMARKS, "w2", [lambda: 1 / 0])
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="cannot write"):
        command.main(["w2", "--output", str(tmp_path / "file" / "results.json")])


def test_the_help_tells_what_each_benchmark_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert set(command.BENCHMARKS) <= {line[0] for line in lines if len(line) == 2}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Kernel, "compile", lambda kernel, steps=1: setattr(kernel, "steps_per_call", steps)
    )
    monkeypatch.setattr(peer, "INSTALLED", False)
    monkeypatch.setattr(chains, "_CHAINS", 4)
    monkeypatch.setattr(chains, "_STEPS", 10)


WORKLOADS = pytest.mark.parametrize(
    ("build", "others"),
    [
        (chains.small_target, []),
        (partial(posterior, TINY), [PRODUCTS]),
        (partial(annealing, TINY), [PRODUCTS]),
        (
            partial(sampler_update, TINY),
            [PRODUCTS, f"{PRODUCTS}, the sampler's networks' too", "as published"],
        ),
    ],
    ids=["w1", "w2", "w3", "w4"],
)


def contenders(build: Callable[[], Workload]) -> list[str]:
    rows = compare(lambda: replace(build(), repeats=2))["rows"]
    assert min(row["speed_ratio"] for row in rows) > 0
    # By torch.mm, where oneDNN's products are faster.
    return sorted(row["contender"] for row in rows if not row["contender"].endswith("torch.mm"))


@pytest.mark.usefixtures("uncompiled")
@WORKLOADS
def test_the_contenders_do_the_same_work(build: Callable[[], Workload], others: list[str]) -> None:
    assert contenders(build) == sorted(["compiled", "eager", *others])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "build", [chains.small_target, partial(posterior, TINY), partial(sampler_update, TINY)]
)
def test_contenders_that_do_other_work_are_refused(
    build: Callable[[], Workload], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(kernel: Kernel, steps: int = 1) -> None:
        kernel.steps_per_call = steps
        kernel.log_step_size.data.fill_(0)

    monkeypatch.setattr(Kernel, "compile", spoil)
    with pytest.raises(RuntimeError, match="differs"):
        build()


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
@pytest.mark.parametrize("build", [chains.small_target, partial(posterior, TINY)])
def test_blackjax_does_the_same_work(
    build: Callable[[], Workload], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("blackjax")
    monkeypatch.setattr(peer, "INSTALLED", True)
    assert "blackjax" in contenders(build)


def test_startup_times_real_commands(small: Arguments) -> None:
    options = small(None, trainer__max_steps=100)
    eager = startup(options, updates=3, compile=("false",))["rows"]
    assert [(row["training"], row["device"]) for row in eager] == [("--compile false", "cpu")]
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
    profiler = SelfTimes(torch.device("cpu"))
    with profiler.profile("epoch"):
        with profiler.profile("run_training_batch"):
            pass
        with profiler.profile("outer"), profiler.profile("inner"):
            pass
    assert profiler.seconds == {"inner": 3.0, "outer": 7.0, "epoch": 19.0}
    assert profiler.total == 29.0


def test_an_action_on_a_gpu_ends_when_the_gpu_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr("torch.cuda.synchronize", waited.append)
    device = torch.device("cuda")
    with SelfTimes(device).profile("action"):
        pass
    assert waited == [device, device]


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


def test_the_products_of_some_work_are_those_forward_and_backward() -> None:
    layer, x = torch.nn.Linear(3, 4), torch.randn(5, 3, requires_grad=True)
    shapes = products_of(lambda: layer(x).sum().backward())
    assert sorted(shapes) == [(4, 5, 3), (5, 3, 4), (5, 4, 3)]
    assert products_of(replay(shapes)) == shapes


def test_the_decoders_products_are_most_of_an_update() -> None:
    update = SamplerUpdate(TINY)
    shapes = products_of(update)
    decoders = [shape for shape in shapes if 784 in shape and shape[0] == 6]
    # One forward and one backward a gradient, and as many again to second order; by the last
    # layer, and by the first one of the embedding, whose input needs no gradient.
    assert len(decoders) == 2 * TINY.update_passes + 1


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
def test_the_peak_is_that_of_the_work_beyond_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # the work is elsewhere
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
