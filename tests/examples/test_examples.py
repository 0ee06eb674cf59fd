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


@pytest.mark.slow
def test_a_kernel_is_learned_for_a_regression(capsys: pytest.CaptureFixture[str]) -> None:
    learned = load("logistic_regression").main(budget=800_000)
    assert learned.converged
    best, hmc = (learned.table.row(name) for name in (learned.chosen, "HMC"))
    assert best["ess_per_gradient"] >= hmc["ess_per_gradient"]
    assert "ESS/gradient" in capsys.readouterr().out


def test_the_energy_of_the_regression_by_hand() -> None:
    example = load("logistic_regression")
    weights = torch.zeros(1, 30, requires_grad=True)
    energy = example.energy(weights)
    assert energy.item() == pytest.approx(569 * 0.6931472, rel=1e-5)
    energy.backward()
    # At w = 0 each tumour pulls by its x, times how far 1/2 is from the outcome.
    torch.testing.assert_close(weights.grad[0], (0.5 - example.benign) @ example.x)
