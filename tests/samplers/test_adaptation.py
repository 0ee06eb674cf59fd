import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import (
    HMC,
    L2HMC,
    GaussianTarget,
    Preconditioned,
    Turns,
    adapt,
    parallel_tempering,
    sample,
    sample_chunks,
    seeded_generator,
    strongly_correlated_gaussian,
    summarise,
)
from samplers.adaptation import DualAveraging, Moments, mass_factor, track_acceptance


def gaussian(position: Tensor) -> Tensor:
    """Ten standard deviations, so that no trajectory returns all coordinates at once."""
    return 0.5 * (position / torch.linspace(0.5, 1.5, 10)).square().sum(dim=-1)


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf, -math.inf])
def test_one_update_by_hand(broken: float) -> None:
    kernel = HMC(step_size=0.1).float()
    buffer, before = kernel.log_step_size, kernel.log_step_size.item()
    acceptance = torch.tensor([0.9, 1.0, 0.8, broken], requires_grad=True)
    track_acceptance(kernel, acceptance, target=0.6, gain=0.5)
    assert kernel.log_step_size is buffer
    assert buffer.dtype == torch.float32
    assert not buffer.requires_grad
    assert buffer.item() == pytest.approx(before + 0.5 * (2.7 / 4 - 0.6), rel=1e-6)


COVARIANCE = torch.tensor([[100.0, 7.0, 0.0], [7.0, 1.0, 0.05], [0.0, 0.05, 0.01]]).double()
CORRELATED = GaussianTarget(torch.tensor([5.0, -1.0, 0.2]), COVARIANCE)


@pytest.mark.parametrize(("target", "step_size"), [(0.65, 1e-3), (0.8, 5.0)])
def test_adapted_step_size_reaches_the_target_acceptance(target: float, step_size: float) -> None:
    kernel, generator = HMC(3, step_size), seeded_generator("cpu", 0)
    position = torch.randn(100, 10)
    adapted = adapt(kernel, gaussian, position, 400, target=target, generator=generator)
    assert adapted.kernel is kernel
    found = sample(kernel, gaussian, adapted.position, 50, generator=generator).acceptance
    # The standard deviation over seeds.
    assert abs(found.mean() - target) < 5 * 0.004


@pytest.mark.parametrize(("before", "factor"), [([0.1, 0.7], 0.25), ([0.9], 2.0)])
def test_dual_averaging_by_hand(before: list[float], factor: float) -> None:
    # The first acceptance beyond the target on the other side ends the halving or doubling.
    start, target = math.log(0.1), 0.8
    averaging = DualAveraging(torch.tensor(start), target)
    for count, acceptance in enumerate(before, start=1):
        found = averaging.update(torch.tensor([acceptance, acceptance]))
        expected = start + math.copysign(count, math.log(factor)) * math.log(2)
        assert found.item() == pytest.approx(expected)
        # A larger one that no step has tried yet is not what a warm-up ends with.
        tried = start + math.copysign(count - 1, math.log(factor)) * math.log(2)
        assert averaging.average.item() == pytest.approx(min(expected, tried))
    centre = start + math.log(factor)
    crossing = [0.9, 0.2, 1.0, 0.6] if factor < 1 else [0.2, 0.9, 1.0, 0.6]
    shortfall, average = 0.0, centre
    for count, acceptance in enumerate(crossing, start=1):
        found = averaging.update(torch.tensor([acceptance, acceptance]))
        share, decay = 1 / (count + 10), count**-0.75
        shortfall = (1 - share) * shortfall + share * (target - acceptance)
        expected = centre - math.sqrt(count) / 0.5 * shortfall
        average = decay * expected + (1 - decay) * average
        assert found.item() == pytest.approx(expected)
        assert averaging.average.item() == pytest.approx(average)


@pytest.mark.parametrize("mass", ["unit", "diagonal", "dense"])
@pytest.mark.parametrize("num_steps", [30, 60, 100, 200, 400])
def test_a_warm_up_of_any_length_ends_near_the_target_acceptance(mass: Any, num_steps: int) -> None:
    target = GaussianTarget(torch.zeros(10), torch.logspace(-2, 2, 10).diag())
    for seed in range(4):
        generator = seeded_generator("cpu", seed)
        start = torch.randn(20, 10, generator=generator)
        warm = adapt(HMC(5), target, start, num_steps, mass=mass, generator=generator)
        found = sample(warm.kernel, target, warm.position, 50, generator=generator).acceptance
        assert 0.4 < found.mean() < 0.9  # over twenty seeds 0.49 to 0.85


def test_turns_are_adapted_one_by_one() -> None:
    with pytest.raises(TypeError, match="adapt each kernel before they take turns"):
        adapt(Turns([HMC(), HMC()]), gaussian, torch.randn(5, 10), 20)


@pytest.mark.parametrize("num_steps", [60, 100])
def test_a_short_warm_up_finds_a_step_size_far_from_one(num_steps: int) -> None:
    # In the coordinates of a diagonal mass this needs a step size of some hundredths.
    target = strongly_correlated_gaussian().float()
    start = target.sample(10, seeded_generator("cpu", 0))
    warm = adapt(HMC(10), target, start, num_steps, mass="diagonal")
    acceptance = sample(warm.kernel, target, warm.position, 50).acceptance
    assert acceptance.mean() > 0.05


@pytest.mark.parametrize("mass", ["diagonal", "dense"])
def test_adapted_mass_recovers_the_covariance(mass: Any) -> None:
    target = CORRELATED
    if mass == "diagonal":
        target = GaussianTarget(CORRELATED.mean, COVARIANCE.diagonal().diag())
    start = target.mean.expand(20, 3)

    kernel, _ = adapt(HMC(5), target, start, 400, mass=mass)
    assert isinstance(kernel, Preconditioned)
    found = kernel.factor @ kernel.factor.T if mass == "dense" else kernel.factor.square()
    expected = target.covariance if mass == "dense" else target.covariance.diagonal()
    # The last window has 160 draws of 20 chains, worth 1000 at least: five errors of √(2/1000).
    scale = target.covariance.diagonal().sqrt()
    scale = torch.outer(scale, scale) if mass == "dense" else scale.square()
    assert ((found - expected).abs() / scale).max() < 5 * math.sqrt(2 / 1000)


@pytest.mark.parametrize("mass", ["unit", "diagonal", "dense"])
def test_one_chain_of_l2hmc_is_adapted_in_single_precision(
    random_l2hmc: Callable[..., L2HMC], mass: Any
) -> None:
    inside = random_l2hmc(3, head_scale=0.1).float()
    others = {name: value.clone() for name, value in inside.state_dict().items()}
    start = CORRELATED.mean.float()[None]
    kernel, position = adapt(
        inside, CORRELATED, start, 150, mass=mass, generator=seeded_generator("cpu", 0)
    )
    assert position.shape == (1, 3)
    assert position.dtype == torch.float32
    assert isinstance(kernel, Preconditioned) == (mass != "unit")
    changed = {
        name for name, value in inside.state_dict().items() if not torch.equal(value, others[name])
    }
    assert changed == {"log_step_size"}
    chains = sample(kernel, CORRELATED, position, 100)
    assert chains.draws.dtype == torch.float32
    assert 0.2 < chains.acceptance.mean() < 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 19}, "num_steps must be at least 20, got 19"),
        ({"num_steps": 29, "mass": "dense"}, "num_steps must be at least 30, got 29"),
        ({"mass": "full"}, "mass must be 'unit', 'diagonal' or 'dense', got 'full'"),
        ({"target": 1.0}, "target must lie between 0 and 1, got 1.0"),
        ({"target": math.nan}, "target must lie between 0 and 1, got nan"),
    ],
)
def test_warm_ups_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        adapt(HMC(), gaussian, torch.zeros(3, 10), **options)


@pytest.mark.parametrize("mass", ["diagonal", "dense"])
def test_mass_does_not_depend_on_the_unit(mass: Any) -> None:
    def factor(unit: float) -> Tensor:
        target = GaussianTarget(torch.zeros(2), unit**2 * torch.tensor([[1.0, 50.0], [50.0, 1e4]]))
        start = target.sample(50, seeded_generator("cpu", 1))
        warm = adapt(
            HMC(step_size=unit), target, start, 200, mass=mass, generator=seeded_generator("cpu", 0)
        )
        return warm.kernel.factor  # type: ignore[return-value]

    # In units of a power of two it is the same but for the rounding of log ε, which grows.
    expected = factor(1.0)
    for unit in (2.0**-17, 2.0**17):
        torch.testing.assert_close(factor(unit) / unit, expected, rtol=1e-4, atol=0)


def test_a_mass_of_few_or_equal_draws_is_positive_definite() -> None:
    for draws in (1000 * torch.randn(10, 50), torch.ones(5, 2)):
        dense, diagonal = (mass_factor(Moments.of(draws), 10, m) for m in ("dense", "diagonal"))
        assert dense.isfinite().all()
        assert (dense.diagonal() > 0).all()
        assert (diagonal > 0).all()


@pytest.mark.parametrize("num_steps", [20, 30, 50, 150, 250, 310])
def test_a_warm_up_takes_as_many_steps_as_it_is_asked_for(
    num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = HMC.step

    def counting(*arguments: Any) -> Any:
        steps.append(1)
        return step(*arguments)

    monkeypatch.setattr(HMC, "step", counting)
    adapt(HMC(1, 0.5), gaussian, torch.zeros(3, 10), num_steps)
    assert len(steps) == num_steps


def test_a_kernel_with_an_embedding_is_adapted_to_its_observations(
    random_l2hmc: Callable[..., L2HMC],
) -> None:
    kernel = random_l2hmc(10, observation_dim=4, embedding_hidden=(3,))
    with torch.no_grad():
        context = kernel.embed(torch.randn(100, 4))
    start = torch.randn(100, 10)
    warm = adapt(kernel, gaussian, start, 400, mass="diagonal", target=0.7, context=context)
    chains = sample(warm.kernel, gaussian, warm.position, 50, context=context)
    # The standard deviation over seeds, of kernel, observations and noise.
    assert abs(float(chains.acceptance.mean()) - 0.7) < 5 * 0.024


def test_a_compiled_kernel_is_compiled_in_its_warm_up(compiler: Any) -> None:
    kernels = HMC(2, 0.5), HMC(2, 0.5)
    kernels[0].compile(backend=compiler)
    compiled, eager = (
        adapt(each, gaussian, torch.zeros(20, 10), 30, generator=seeded_generator("cpu", 0))
        for each in kernels
    )
    assert len(compiler.graphs) == 1  # for all step sizes
    torch.testing.assert_close(compiled.position, eager.position)
    torch.testing.assert_close(kernels[0].step_size, kernels[1].step_size)


def test_chains_that_stay_stuck_are_told_of_and_left_out_of_the_mass() -> None:
    generator = seeded_generator("cpu", 0)

    def energy(x: Tensor) -> Tensor:  # Beyond 100 lies a well too narrow for any step size.
        return torch.where(x[:, 0] > 100, 1e12 * (x[:, 0] - 200).square(), gaussian(x))

    start = torch.randn(50, 10, generator=generator)
    start[:3, 0] = 200 + 1e-5
    kernel = HMC(5, 0.5)
    with pytest.warns(UserWarning, match="^3 of 50 chains did not move in the last") as told:
        warm = adapt(kernel, energy, start, 200, mass="diagonal", generator=generator)
    assert len(told) == 1
    exact = torch.linspace(0.5, 1.5, 10)
    assert isinstance(warm.kernel, Preconditioned)
    assert ((warm.kernel.factor / exact - 1).abs() < 0.2).all()
    with pytest.warns(UserWarning, match="^3 of 50 chains did not move in 60 steps"):
        chains = sample(warm.kernel, energy, warm.position, 60, generator=generator)
    with pytest.warns(UserWarning, match="^3 of 50 chains did not move in 60 steps"):
        list(sample_chunks(warm.kernel, energy, warm.position, 60, chunk_size=7))
    for draws in (chains.draws, chains):
        with pytest.warns(UserWarning, match="^3 of 50 chains never move"):
            summarise(draws)
    with pytest.warns(UserWarning, match="^3 of 50 chains did not move in 60 steps"):
        parallel_tempering(energy, warm.position, 60, torch.tensor([1.0, 1.1]))


def test_broad_starts_leave_no_chain_stuck() -> None:
    generator = seeded_generator("cpu", 0)

    def steep(x: Tensor) -> Tensor:
        return 0.25 * x.pow(4).sum(dim=1)

    start = 30 * torch.randn(100, 3, generator=generator)
    warm = adapt(HMC(5), steep, start, 200, mass="diagonal", generator=generator)
    chains = sample(warm.kernel, steep, warm.position, 100, generator=generator)
    assert (chains.acceptance.mean(dim=1) > 0.3).all()


def test_a_warm_up_ends_with_the_averaged_step_size(monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[tuple[Tensor, Tensor]] = []
    update = DualAveraging.update

    def recorded(averaging: DualAveraging, acceptance: Tensor) -> Tensor:
        log_step_size = update(averaging, acceptance)
        followed.append((log_step_size.clone(), averaging.average.clone()))
        return log_step_size

    monkeypatch.setattr(DualAveraging, "update", recorded)
    kernel = HMC(5)
    adapt(kernel, gaussian, torch.randn(4, 10), 100)
    last, average = followed[-1]
    assert torch.equal(kernel.log_step_size, average)
    assert (last - average).abs() > 1e-3


def test_mixed_moments_are_those_of_all_batches() -> None:
    batches = torch.randn(4, 5, 3) * torch.tensor([1.0, 2.0, 3.0]) + torch.randn(4, 1, 3)
    moments = Moments.of(batches[0])
    for count, batch in enumerate(batches[1:], start=2):
        moments = moments.mixed(Moments.of(batch), 1 / count)
    pooled = batches.flatten(0, 1)
    torch.testing.assert_close(moments.mean, pooled.mean(dim=0))
    torch.testing.assert_close(moments.covariance, torch.cov(pooled.T, correction=0))
