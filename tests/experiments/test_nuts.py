"""What the outside reference and the baselines cost."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.targets import nuts
from samplers import TARGETS
from samplers.posteriors import POSTERIORS


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


@pytest.mark.parametrize("name", [*TARGETS, *POSTERIORS])
def test_the_density_in_jax_is_the_targets(name: str) -> None:
    pytest.importorskip("jax")
    target = (TARGETS.get(name) or POSTERIORS[name])().float()
    points = 0.5 * torch.randn(5, target.dim, generator=torch.Generator().manual_seed(0))
    log_density = nuts._log_density(target)
    nuts.check_density(log_density, target, points)
    with pytest.raises(ValueError, match="in JAX is another one"):
        nuts.check_density(lambda x: 0.5 * log_density(x), target, points)
