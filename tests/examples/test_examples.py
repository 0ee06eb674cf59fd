"""The examples run at a small size, and give what is known."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_precisions_have_the_exact_moments(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("constrained_parameters")
    found = example.main(num_chains=50, num_steps=300)
    assert (found.exact.mean / found.exact.mean.min()).max() > 3  # the instruments differ
    for name, enough in (("mean", 0.02), ("variance", 0.1)):
        value, error = getattr(found, name), getattr(found, f"{name}_error")
        exact = getattr(found.exact, name)
        assert (error < enough * exact).all()
        assert ((value - exact).abs() < 5 * error).all()
    assert capsys.readouterr().out.count("exact") == 6


def test_all_samplers_find_the_posterior_of_the_regression(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load("logistic_regression")
    monkeypatch.setattr(example, "nuts_is_installed", lambda: False)
    results = example.main(num_chains=60, num_warmup=200, num_iterations=30, num_steps=250)
    assert "blackjax is not installed" in capsys.readouterr().out
    *others, reference = results
    assert [one.sampler for one in others] == [f"HMC, leapfrogs: {n}" for n in (1, 2, 3)]
    assert reference.sampler.startswith("L2HMC")
    for one in others[1:]:
        assert one.summary.worst().ess_bulk > 400
        error = (one.summary.mcse**2 + reference.summary.mcse**2).sqrt()
        assert ((one.mean - reference.mean).abs() < 5 * error).all()


def test_the_gradient_of_the_regression_vanishes_where_it_says() -> None:
    example = load("logistic_regression")
    energy = example.LogisticRegression()
    weights = torch.zeros(1, energy.dim, requires_grad=True)
    energy(weights).sum().backward()
    # At w = 0 each tumour pulls by half of its y x.
    torch.testing.assert_close(weights.grad[0], -energy.signed.sum(dim=0) / 2)
    assert energy(torch.zeros(1, energy.dim)).item() == pytest.approx(569 * 0.6931472, rel=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("blackjax") is None, reason="needs the extra bench")
def test_the_regression_in_jax_is_the_same() -> None:
    example = load("logistic_regression")
    energy = example.LogisticRegression()
    points = torch.randn(7, energy.dim, generator=torch.Generator().manual_seed(0))
    example.check_density(energy.log_density, energy, points)
    with pytest.raises(ValueError, match="in JAX is another one"):
        example.check_density(lambda w: energy.log_density(w) / 2, energy, points)
