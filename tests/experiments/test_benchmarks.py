"""The benchmarks at sizes that take seconds; their figures are not looked at, their sums are."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import __main__ as command
from experiments.benchmarks import peer, workloads
from experiments.benchmarks.cases import PRODUCTS, Posterior, SamplerUpdate, Sizes
from experiments.benchmarks.published import PublishedL2HMC
from experiments.benchmarks.scaling import scaling
from experiments.benchmarks.timing import Workload, agree, compare
from experiments.benchmarks.workloads import annealing, posterior, sampler_update
from experiments.shared.cli import CommandError
from samplers import L2HMC, Kernel

GROWING = ("chains", "MH steps", "leapfrogs", "latent dimensions")
TINY = Sizes(6, 3, (12,), 2, 2, 8, (8,))


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
    monkeypatch.setattr(workloads, "_CHAINS", 4)
    monkeypatch.setattr(workloads, "_STEPS", 10)


WORKLOADS = pytest.mark.parametrize(
    ("build", "others"),
    [
        (workloads.small_target, []),
        (partial(posterior, TINY), [PRODUCTS]),
        (partial(annealing, TINY), [PRODUCTS]),
        (
            partial(sampler_update, TINY),
            [PRODUCTS, "as published"],
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
    "build", [workloads.small_target, partial(posterior, TINY), partial(sampler_update, TINY)]
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
@pytest.mark.parametrize("build", [workloads.small_target, partial(posterior, TINY)])
def test_blackjax_does_the_same_work(
    build: Callable[[], Workload], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("blackjax")
    monkeypatch.setattr(peer, "INSTALLED", True)
    assert "blackjax" in contenders(build)


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
