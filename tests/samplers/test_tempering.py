from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import (
    HMC,
    Energy,
    GaussianMixture,
    State,
    parallel_tempering,
    sample,
    seeded_generator,
    summarise,
    value_and_gradient,
)
from samplers.tempering import _exchange, _moved

MIXTURE = GaussianMixture([[-2.5, 0.0], [2.5, 0.5]], [0.2, 0.1], [0.3, 0.7])
LADDER = torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64)


def assert_within_five_errors(values: Tensor, expected: Tensor) -> None:
    """Values of independent chains, (chain, draw, …), each worth enough draws."""
    per_chain = values.mean(dim=1)
    error = per_chain.std(dim=0) / len(per_chain) ** 0.5
    assert ((per_chain.mean(dim=0) - expected).abs() < 5 * error).all()


def test_weights_and_moments_of_modes_that_one_chain_never_leaves() -> None:
    start = MIXTURE.centres.repeat_interleave(100, dim=0)
    alone = sample(HMC(5, 0.2), MIXTURE, start, 100).draws[..., 0]
    assert (alone.sign() == start[:, :1].sign()).all()

    chains = parallel_tempering(MIXTURE, start, 800, LADDER, num_leapfrogs=5, step_size=0.3)
    torch.testing.assert_close(
        chains.energy.flatten(), MIXTURE(chains.draws.flatten(0, 1)), rtol=1e-9, atol=1e-9
    )
    for draws in chains.draws[:, 200:].split(100):  # of each start
        assert (summarise(draws).ess_bulk > 1000).all()
        weight = MIXTURE.responsibilities(draws.flatten(0, 1))[:, 0].view(draws.shape[:2])
        assert_within_five_errors(weight, torch.tensor(0.3))
        assert_within_five_errors(draws, MIXTURE.mean)
        centred = draws - MIXTURE.mean
        products = centred[..., :, None] * centred[..., None, :]
        assert_within_five_errors(products, MIXTURE.covariance)


def test_one_temperature_is_hmc_on_a_skewed_target(energy: Energy) -> None:
    start = torch.randn(4, 3)
    options: dict = {"num_leapfrogs": 3, "step_size": 0.5}
    found = parallel_tempering(
        energy, start, 20, torch.ones(1), generator=seeded_generator("cpu", 1), **options
    )
    kernel, generator = HMC(jitter=0.5, **options), seeded_generator("cpu", 1)
    state = kernel.init(start, energy)
    for draw in range(20):
        state, info = kernel.step(state, energy, kernel.noise(state, generator))
        torch.rand(0, 4, generator=generator)
        torch.testing.assert_close(found.draws[:, draw], state.position)
        torch.testing.assert_close(found.acceptance[:, draw], info.acceptance)


def test_chains_never_mix() -> None:
    """Chains in wells a thousand apart: a position of another chain would be seen at once."""
    wells = 1000.0 * torch.arange(8.0)[:, None]

    def periodic(position: Tensor) -> Tensor:
        return 0.5 * (position - 1000 * (position / 1000).round()).square().sum(dim=-1)

    chains = parallel_tempering(periodic, wells, 100, LADDER, step_size=0.3)
    assert (chains.draws - wells[:, None]).abs().max() < 100
    # The cold replica does take positions over: a jump that its own dynamics did not make.
    assert (chains.draws.diff(dim=1) != 0).any(dim=1).all()


def test_exchange_swaps_neighbours_of_one_chain_with_the_probability_of_the_ratio() -> None:
    inverse, count = torch.tensor([1.0, 0.5, 0.25]), 100_000
    energy = torch.tensor([1.0, 0.0, 0.5])[:, None].expand(3, count)
    for first, (low, other), log_ratio in ((0, (0, 1), 0.5), (1, (1, 2), -0.125)):
        order = _exchange(energy, inverse, first, seeded_generator("cpu", 0))
        assert torch.equal(order.sort(dim=0).values, torch.arange(3)[:, None].expand(3, count))
        swapped = order[low] == other
        assert torch.equal(order[other] == low, swapped)
        probability = min(1.0, torch.tensor(log_ratio).exp().item())
        error = (probability * (1 - probability) / count) ** 0.5
        assert abs(swapped.double().mean().item() - probability) <= 5 * error


@pytest.mark.parametrize(
    "temperatures",
    [[2.0, 4.0], [1.0, 1.0], [1.0, 3.0, 2.0], [1.0, torch.nan], [1.0, torch.inf], [], [[1.0, 2.0]]],
)
def test_temperatures_that_do_not_increase_from_one_are_refused(temperatures: list) -> None:
    with pytest.raises(ValueError, match="temperatures must increase from 1") as error:
        parallel_tempering(MIXTURE, torch.zeros(3, 2), 5, temperatures)
    assert "\n" not in str(error.value)


def test_no_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        parallel_tempering(MIXTURE, torch.zeros(3, 2), 0, LADDER)


def test_what_an_energy_keeps_is_exchanged_with_the_positions(
    energy: Energy, with_extra: Energy, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[State] = []

    def recorded(*arguments: Any) -> State:
        states.append(_moved(*arguments))
        return states[-1]

    monkeypatch.setattr("samplers.tempering._moved", recorded)
    start = torch.randn(4, 3)
    parallel_tempering(with_extra, start, 10, LADDER, step_size=0.3)
    temperature = LADDER.repeat_interleave(4)
    for state in states:
        expected = value_and_gradient(energy, state.position)
        torch.testing.assert_close(state.energy * temperature, expected.energy)
        torch.testing.assert_close(state.gradient * temperature[:, None], expected.gradient)
        assert torch.equal(state.extra[0], state.position.sum(dim=-1))
