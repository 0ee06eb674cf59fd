"""What the outside reference and the baselines cost."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.targets import nuts, tuning
from experiments.targets.tuning import Tuned, baselines, warm_up_gradients
from samplers import HMC, TARGETS


def test_nuts_samples_a_correlated_gaussian() -> None:
    pytest.importorskip("blackjax")
    target = TARGETS["scg"]().float()
    start = target.sample(50, torch.Generator().manual_seed(0))
    chains, cost, settings = nuts.run_nuts(target, start, 100, 0)
    assert chains.draws.shape == (50, 100, 2)
    standardised = torch.linalg.solve_triangular(
        torch.linalg.cholesky(target.covariance), chains.draws[:, -1].T, upper=False
    )
    # Squares of 50 independent draws of two coordinates: within 5 standard errors of 1.
    assert standardised.square().mean() == pytest.approx(1, abs=5 * (2 / 100) ** 0.5)
    assert cost.training_gradients > 1000
    assert settings.endswith("adapted diagonal mass")


def test_compiling_is_not_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    jax = pytest.importorskip("jax")
    pytest.importorskip("blackjax")
    events = []

    def log_density(x: Any) -> Any:
        events.append("traced")
        return -0.5 * jax.numpy.square(x).sum()

    def clock() -> float:
        events.append("clock")
        return 0.0

    monkeypatch.setattr(nuts, "time", SimpleNamespace(perf_counter=clock))
    nuts.sample_with_nuts(log_density, torch.zeros(2, 1), 5, 0)
    ends = [place for place, event in enumerate(events) if event == "clock"]
    # Nothing between beginning and end, of the warm-up and of the run.
    assert [ends[1] - ends[0], ends[3] - ends[2]] == [1, 1]
    assert "traced" in events


def test_the_cost_of_a_baseline_has_the_warm_up_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def warm_up(*arguments: object) -> HMC:
        clock[0] += 5.0
        return HMC()

    monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(tuning, "warmed_up", warm_up)
    monkeypatch.setattr(tuning, "tune", lambda *arguments: Tuned(HMC(), "settings", 7, 1.0))
    found = baselines(TARGETS["mog"](), torch.zeros(3, 2), 10, 100, 0)
    assert len(found) == 5
    for tuned in found.values():
        assert tuned.seconds == 6.0
        assert tuned.gradients == 7 + 3 * warm_up_gradients(100)
