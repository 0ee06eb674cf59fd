import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from samplers import diagnostics, seeded_generator, summarise
from samplers.diagnostics import RELEASE_CUTOFF, autocorrelation, ess_per_step


def autoregression(
    coefficient: float, chains: int = 200, draws: int = 2000, dim: int = 1, seed: int = 0
) -> Tensor:
    """Return stationary AR(1) chains of unit variance, ρ_t = φᵗ and ESS (1 - φ) / (1 + φ)."""
    generator = seeded_generator("cpu", seed)
    noise = torch.randn(draws, chains, dim, generator=generator)
    values = [noise[0]]
    for innovation in noise[1:]:
        values.append(coefficient * values[-1] + (1 - coefficient**2) ** 0.5 * innovation)
    return torch.stack(values, dim=1)


def standard(draws: Tensor, num_lags: int | None = None) -> Tensor:
    """Return the autocorrelation of chains of zero mean and unit covariance."""
    dim = draws.shape[-1]
    return autocorrelation(draws, torch.zeros(dim), torch.eye(dim), num_lags)


@pytest.mark.parametrize("num_lags", [1, 6, 12])
def test_autocorrelation_is_that_of_the_double_sum(num_lags: int) -> None:
    draws, mean, factor = torch.randn(3, 13, 4), torch.randn(4), torch.randn(4, 4)
    covariance = factor @ factor.mT
    centred = draws - mean
    expected = torch.stack(
        [
            (centred[:, : 13 - lag] * centred[:, lag:]).sum(dim=-1).mean(dim=1)
            / covariance.diag().sum()
            for lag in range(num_lags + 1)
        ],
        dim=1,
    )
    torch.testing.assert_close(autocorrelation(draws, mean, covariance, num_lags), expected)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.randn(7, 50, 3)
    whole = standard(draws)
    monkeypatch.setattr(diagnostics, "_BLOCK", 500)
    torch.testing.assert_close(standard(draws), whole)


def test_single_precision_draws_are_summed_in_double() -> None:
    draws = autoregression(0.5, 5, 100).float()
    found = standard(draws)
    assert found.dtype == torch.float64
    assert found.shape == (5, 51)  # lags reach half the run
    torch.testing.assert_close(found, standard(draws.double()))


@pytest.mark.parametrize("coefficient", [-1 / 3, 0.0, 1 / 3, 0.8])
def test_ess_of_an_autoregression(coefficient: float) -> None:
    """2 for an antithetic chain, 1 for independent draws, 1/2 and 1/9 for sluggish ones."""
    found = ess_per_step(standard(autoregression(coefficient, dim=5)))
    expected = (1 - coefficient) / (1 + coefficient)
    assert found.standard_error < 0.06 * expected
    assert abs(found.value - expected) < 5 * found.standard_error


def test_cutoff_of_the_release_flatters() -> None:
    found = standard(autoregression(1 / 3))
    value, error = ess_per_step(found, RELEASE_CUTOFF)
    assert abs(value - 1 / (1 + 2 * (1 / 3 + 1 / 9))) < 5 * error  # 0.529 instead of 0.5
    assert error < 0.01
    assert value > ess_per_step(found, 0.01).value


def test_standard_error_is_the_spread_of_repetitions() -> None:
    repeats = [ess_per_step(standard(autoregression(0.5, 60, 100, 3, seed))) for seed in range(200)]
    values, errors = torch.tensor(repeats).unbind(dim=-1)
    # A variance from 200 values has a relative standard error of √(2 / 199) = 0.1.
    assert 0.5 < errors.square().mean() / values.var() < 1.5


@pytest.mark.parametrize(
    ("autocorrelations", "value"),
    [([[1.0, -0.6], [1.0, -0.5]], math.nan), ([[1.0, 0.5]], 0.5)],
    ids=["an impossible sum", "one chain"],
)
def test_what_is_not_known_is_not_a_number(
    autocorrelations: list[list[float]], value: float
) -> None:
    found = ess_per_step(torch.tensor(autocorrelations))
    assert found == pytest.approx((value, math.nan), nan_ok=True)


@pytest.mark.parametrize(("length", "num_lags"), [(5, 5), (5, 9), (5, 0), (1, None)])
def test_lags_beyond_the_chains_are_refused(length: int, num_lags: int | None) -> None:
    with pytest.raises(ValueError, match=f"longer chains than {length} draws"):
        standard(torch.zeros(2, length, 1), num_lags)


@pytest.mark.parametrize("coefficient", [-0.3, 0.0, 0.5])
def test_summary_of_autoregressions(coefficient: float) -> None:
    chains, length, dim = 10, 1000, 24
    draws = 3.0 * autoregression(coefficient, chains, length, dim)
    summary = summarise(draws)
    expected = chains * length * (1 - coefficient) / (1 + coefficient)
    for found, known in (
        (summary.ess_bulk, expected),
        (summary.mcse, 3.0 / expected**0.5),
    ):
        error = found.std() / dim**0.5
        assert error < 0.02 * known
        assert (found.mean() - known).abs() < 5 * error
    assert (summary.r_hat < 1.01).all()
    assert all(field.dtype == torch.float64 for field in summary)


def faulty(draws: Tensor, fault: str) -> Tensor:
    """Spoil coordinate 2 of well-mixed chains."""
    draws = draws.clone()
    if fault == "one chain is elsewhere":
        draws[0, :, 2] += 3.0
    elif fault == "one chain is wider":
        draws[0, :, 2] *= 6.0
    elif fault == "slow":
        draws[:, :, 2] = autoregression(0.95, *draws.shape[:2])[:, :, 0]
    return draws


@pytest.mark.parametrize("fault", ["one chain is elsewhere", "one chain is wider", "slow"])
def test_worst_coordinate_is_found(fault: str) -> None:
    summary = summarise(faulty(autoregression(0.0, 6, 500, 4), fault))
    worst = summary.worst()
    assert worst.ess_tail == summary.ess_tail[2]
    assert worst.ess_tail < 0.3 * summary.ess_tail[[0, 1, 3]].min()
    assert worst.r_hat == summary.r_hat[2]
    assert worst.mcse == summary.mcse[2]
    assert worst.r_hat > (1.01 if fault == "slow" else 1.1)
    assert worst.ess_bulk == summary.ess_bulk.min()


@pytest.mark.parametrize("stuck", [lambda x: x * 0.0, lambda x: x * torch.nan])
def test_coordinate_that_never_changes_has_no_effective_draws(
    stuck: Callable[[Tensor], Tensor],
) -> None:
    draws = autoregression(0.0, 4, 100, 2)
    draws[:, :, 1] = stuck(draws[:, :, 1])
    summary = summarise(draws)
    assert all(field[1].isnan() and field[0].isfinite() for field in summary)
    assert all(field.isnan() for field in summary.worst())


def test_chains_that_never_move_are_told_of_even_if_all_are() -> None:
    draws = autoregression(0.0, 4, 100, 2)
    for count in (1, 4):
        draws[:count] = draws[:count, :1]
        with pytest.warns(UserWarning, match=f"^{count} of 4 chains never move"):
            summarise(draws)
