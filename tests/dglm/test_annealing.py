import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dglm import DiagonalGaussian, GenerativeModel
from dglm.ais import transition
from dglm.annealing import (
    AnnealedEnergy,
    StepSizes,
    anneal,
    pilot_gradients,
    temperatures,
    tune_step_sizes,
)
from samplers import HMC, Energy, Noise, State, seeded_generator, value_and_gradient

Model = Callable[..., GenerativeModel]


class Path:
    """A path to the posterior of seven images, and how often its likelihood was evaluated."""

    def __init__(self, model: GenerativeModel, x: Tensor) -> None:
        self.model, self.x, self.calls = model, x, 0
        self.start = DiagonalGaussian(torch.randn(7, 3), 0.3 * torch.randn(7, 3))
        self.energy = AnnealedEnergy(self.misfit, self.start)

    def misfit(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self.model.negative_log_likelihood(self.x)(z)  # type: ignore[operator]

    def by_hand(self, beta: float, z: Tensor) -> Tensor:
        log_joint = self.model.log_joint(self.x, z)
        return -(1 - beta) * self.start.log_prob(z) - beta * log_joint


@pytest.fixture
def path(model: GenerativeModel, images: Tensor) -> Path:
    return Path(model, images)


# Temperatures


@pytest.mark.parametrize("count", [1, 2, 7, 1001])
def test_temperatures_rise_from_zero_to_one_and_are_close_together_at_both_ends(count: int) -> None:
    betas = temperatures(count)
    assert betas.dtype == torch.float64
    assert (betas[0], betas[-1]) == (0, 1)
    low, high = torch.sigmoid(torch.tensor([-4.0, 4.0]))
    wanted = torch.linspace(-4, 4, count + 1)
    torch.testing.assert_close(torch.logit(low.lerp(high, betas)), wanted)


# The path


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_path_leads_from_the_start_to_the_posterior(path: Path, beta: float) -> None:
    z = torch.randn(7, 3)
    path.energy.beta = beta
    state = path.energy.value_and_gradient(z)
    expected = value_and_gradient(lambda z: path.by_hand(beta, z), z)
    torch.testing.assert_close(state[:3], expected[:3])


@pytest.mark.parametrize("std", [0.1, 0.003])
def test_narrow_starts_are_exact_in_single_precision(std: float) -> None:
    mean = torch.randn(40, 50, dtype=torch.float32)
    start = DiagonalGaussian(mean, torch.full_like(mean, std).log())
    path = AnnealedEnergy(lambda z: 0.0 * z.sum(dim=-1), start)
    draws = start.sample(), start.sample()
    first, second = (path.value_and_gradient(z).energy.double() for z in draws)
    exact = DiagonalGaussian(*(part.double() for part in start))
    expected = exact.log_prob(draws[1].double()) - exact.log_prob(draws[0].double())
    # The last digits of energies of up to 300 nats.
    torch.testing.assert_close(first - second, expected, rtol=0, atol=5e-5)


def test_a_change_of_temperature_costs_no_gradient_wherever_the_chain_is(path: Path) -> None:
    kernel = HMC(3, 1.2)
    path.energy.beta = 0.5
    state = path.energy.value_and_gradient(path.start.sample())
    moved, info = kernel.step(state, path.energy, kernel.noise(state))
    assert info.accepted.any()
    assert not info.accepted.all()
    assert path.calls == 1 + 3
    changed = path.energy.at(0.9, moved)
    assert path.calls == 1 + 3
    torch.testing.assert_close(changed, path.energy.value_and_gradient(moved.position))
    assert not torch.equal(changed.energy, moved.energy)


def test_slope_is_the_derivative_of_the_path_in_the_temperature(path: Path) -> None:
    z = torch.randn(7, 3)
    expected = path.model.log_joint(path.x, z) - path.start.log_prob(z)
    slope = path.energy.slope(path.energy.value_and_gradient(z))
    torch.testing.assert_close(slope, expected.detach())
    start = DiagonalGaussian(*(tensor.float() for tensor in path.start))
    energy = AnnealedEnergy(path.model.float().negative_log_likelihood(path.x.float()), start)
    assert energy.slope(energy.value_and_gradient(z.float())).dtype == torch.float64


# Annealing


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 4])
def test_weights_are_taken_before_transitions_with_the_step_sizes_of_image_and_temperature(
    path: Path, count: int
) -> None:
    z, betas, steps = path.start.sample(), temperatures(count), 0.1 + torch.rand(count - 1, 7)
    found = anneal(path.energy, z, betas, HMC(2, jitter=0.5), steps, seeded_generator("cpu", 0))
    generator, expected = seeded_generator("cpu", 0), torch.zeros(7)
    acceptances = [torch.zeros(7)] if count == 1 else []
    for index in range(count):
        before, after = (path.by_hand(float(beta), z) for beta in betas[index : index + 2])
        expected += before - after
        if index < count - 1:
            kernel = HMC(2, jitter=0.5)
            kernel.log_step_size = steps[index].log()[:, None]
            state = kernel.init(z, partial(path.by_hand, float(betas[index + 1])))
            noise = kernel.noise(state, generator)
            state, info = kernel.step(state, partial(path.by_hand, float(betas[index + 1])), noise)
            z = state.position
            acceptances.append(info.acceptance)
    torch.testing.assert_close(found.log_weight, expected)
    torch.testing.assert_close(found.acceptance, torch.stack(acceptances).mean(dim=0))


@torch.no_grad()
def test_chains_of_an_image_share_its_step_size_but_not_its_jitter() -> None:
    used: list[Tensor] = []

    class Watched(HMC):
        def step(self, state: State, energy: Energy, noise: Noise) -> Any:  # type: ignore[override]
            used.append(self.step_size[:, 0] * noise.direction.abs())
            return super().step(state, energy, noise)

    steps = torch.tensor([[0.1, 1.0, 3.0]]).expand(100, -1)
    rows = torch.arange(3).repeat_interleave(2)
    prior = DiagonalGaussian(torch.zeros(6, 2), torch.zeros(6, 2))
    energy = AnnealedEnergy(lambda z: z.sum(dim=1), prior)
    kernel = transition(1, torch.device("cpu"), compile=False)
    watched, generator = Watched(1, jitter=kernel.jitter), seeded_generator("cpu", 0)
    anneal(energy, prior.sample(), temperatures(101), watched, steps, generator)
    share = torch.stack(used) / steps[0, rows]
    assert 0.5 <= share.min() < 0.51
    assert 0.99 < share.max() <= 1.0
    assert not torch.equal(share[:, 0], share[:, 1])


def test_no_trajectory_resonates() -> None:
    # Five leapfrogs of this step size are one period of N(0, I): undisturbed, no chain moves.
    tuning = StepSizes(5, torch.tensor([2 * math.sin(math.pi / 5)]).log(), 2000)
    energy, generator = lambda z: 0.5 * z.square().sum(dim=1), seeded_generator("cpu", 0)
    state = value_and_gradient(energy, torch.randn(2000, 1))
    ends = tuning.step(state, energy, generator, tune=False).position
    pairs = torch.cat([state.position, ends], dim=1)
    assert pairs.T.corrcoef()[0, 1] < 0.6


# The pilot run


@torch.no_grad()
@pytest.mark.parametrize("num_temperatures", [1, 2, 120])
def test_the_pilot_finds_step_sizes_for_each_image_and_inner_temperature(
    path: Path, num_temperatures: int
) -> None:
    reported: list[int] = []
    betas, generator = temperatures(num_temperatures), seeded_generator("cpu", 0)
    tuned = tune_step_sizes(path.energy, betas, 2, 1, generator, reported.append)
    assert tuned.step_sizes.shape == (num_temperatures - 1, 7)
    assert (tuned.step_sizes > 0).all()
    assert tuned.position.shape == (7, 3)
    assert pilot_gradients(num_temperatures, 2) == path.calls == sum(reported)


@torch.no_grad()
def test_step_sizes_that_the_pilot_leaves_out_are_interpolated(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dglm.annealing._PILOT_TEMPERATURES", 5)
    visited: dict[float, float] = {}

    class Watched(AnnealedEnergy):
        def at(self, beta: float, state: State) -> State:
            visited[beta] = float("nan")
            return super().at(beta, state)

    betas = temperatures(13)
    energy = Watched(path.misfit, path.start)
    steps = tune_step_sizes(energy, betas, 2, 1, seeded_generator("cpu", 0)).step_sizes
    inner = betas[1:-1].tolist()
    known = [index for index, beta in enumerate(inner) if beta in visited]
    assert len(known) == 5
    assert (known[0], known[-1]) == (0, 11)
    for logs in steps.log().T.numpy():
        np.testing.assert_allclose(logs, np.interp(np.arange(12), known, logs[known]))
        assert len(set(logs[known])) == 5


@torch.no_grad()
def test_the_pilot_reaches_the_target_acceptance_for_each_image(linear_gaussian: Model) -> None:
    chains, betas = 200, temperatures(60)
    models = [linear_gaussian(3, 8, noise) for noise in (0.2, 2.0)]
    x = [model.sample(1, seeded_generator("cpu", 1))[0].expand(chains, -1) for model in models]
    energies = [each.negative_log_likelihood(rows) for each, rows in zip(models, x, strict=True)]

    def both(z: Tensor) -> Tensor:
        return torch.cat([each(part) for each, part in zip(energies, z.chunk(2), strict=True)])

    prior = DiagonalGaussian(torch.zeros(2 * chains, 3), torch.zeros(2 * chains, 3))
    path, generator = AnnealedEnergy(both, prior), seeded_generator("cpu", 0)
    steps = tune_step_sizes(path, betas, 3, chains, generator).step_sizes
    found = anneal(path, prior.sample(generator), betas, HMC(3, jitter=0.5), steps, generator)
    assert ((found.acceptance.view(2, chains).mean(dim=1) - 0.65).abs() < 0.1).all()
    assert steps[-1, 1] > 3 * steps[-1, 0]  # the second posterior is wider
