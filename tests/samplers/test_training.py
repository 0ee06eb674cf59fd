import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from samplers import (
    HMC,
    L2HMC,
    Energy,
    GaussianTarget,
    Info,
    Moments,
    Noise,
    Preconditioned,
    State,
    TrainingHistory,
    TrainingSettings,
    reciprocal_jump_loss,
    train_sampler,
)
from samplers.training import _Training

SCALES = torch.tensor([[0.5, 0.0], [1.5, 1.0]], dtype=torch.float64)
CENTRE = torch.tensor([1.0, -2.0], dtype=torch.float64)
TARGET = GaussianTarget(CENTRE, SCALES @ SCALES.T)
Build = Callable[..., L2HMC]


def initial(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 2, generator=generator)


class Recording(L2HMC):
    """A kernel that remembers what it was asked, and what it answered."""

    def __init__(self) -> None:
        super().__init__(2, num_leapfrogs=2, step_size=0.3, hidden=4, head_scale=1.0)
        self.steps: list[tuple[State, State, Info]] = []

    def forward(
        self, state: State, energy: Energy, noises: list[Noise], context: Tensor | None = None
    ) -> list[tuple[State, Info]]:
        [(after, info)] = super().forward(state, energy, noises, context)
        self.steps.append((state, after, info))
        return [(after, info)]


class Stopped(Exception):
    """Stands for whatever ends a training early."""


def stop_after(count: int) -> Callable[[int], None]:
    done = 0

    def progress(iterations: int) -> None:
        nonlocal done
        done += iterations
        if done >= count:
            raise Stopped

    return progress


def fail_in(iteration: int, patch: pytest.MonkeyPatch) -> None:
    """Have training fail in the midst of an iteration, counted from 1."""
    update = _Training._update

    def failing(self: _Training, loss: Tensor) -> Tensor:
        if len(self.history) == iteration - 1:
            raise Stopped
        return update(self, loss)

    patch.setattr(_Training, "_update", failing)


def without_durations(history: TrainingHistory) -> TrainingHistory:
    assert (history.seconds > 0).all()
    return history._replace(seconds=torch.zeros(()))


def assert_same(found: TrainingHistory, expected: TrainingHistory) -> None:
    assert all(map(torch.equal, without_durations(found), without_durations(expected)))


# The file is written after iterations 4, 8 and 10: one stop before the first, others between.
@pytest.mark.parametrize("way", ["fails", "is stopped"])
@pytest.mark.parametrize("stops", [[2], [5], [9], [10], [3, 6, 9]])
def test_resumed_training_repeats_the_uninterrupted_one(
    random_l2hmc: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stops: list[int], way: str
) -> None:
    monkeypatch.setattr("samplers.training._SAVE_INTERVAL", 4)
    settings = TrainingSettings(
        num_iterations=10,
        num_chains=5,
        initial_weight=0.5,
        metric="covariance",
        initial_temperature=4.0,
        annealing_iterations=6,
        learning_rate=0.01,
        learning_rate_decay=1e-100,
        seed=3,
    )
    whole, path = random_l2hmc(2), tmp_path / "training.pt"
    expected = train_sampler(whole, TARGET, initial, settings)
    kernel = random_l2hmc(2)
    for stop in stops:
        progress = stop_after(stop) if way == "is stopped" else lambda count: None
        with pytest.MonkeyPatch.context() as patch:
            if way == "fails":
                fail_in(stop, patch)
            with pytest.raises(Stopped):
                train_sampler(kernel, TARGET, initial, settings, checkpoint=path, progress=progress)
        done = (stop - 1) // 4 * 4 if way == "fails" else stop
        kernel = random_l2hmc(2, seed=int(path.exists()))
    counts: list[int] = []
    found = train_sampler(
        kernel, TARGET, initial, settings, checkpoint=path, progress=counts.append
    )
    assert counts[0] == done
    assert sum(counts) == 10
    assert_same(found, expected)
    trained = whole.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in kernel.state_dict().items())


def test_finished_training_is_read_back(random_l2hmc: Build, tmp_path: Path) -> None:
    settings, path = TrainingSettings(num_iterations=3, num_chains=5), tmp_path / "training.pt"
    kernel, counts = random_l2hmc(2), []
    expected = train_sampler(kernel, TARGET, initial, settings, checkpoint=path)
    before = {key: value.clone() for key, value in kernel.state_dict().items()}
    again = train_sampler(
        kernel, TARGET, initial, settings, checkpoint=path, progress=counts.append
    )
    assert counts == [3]
    assert_same(again, expected)
    assert all(torch.equal(value, before[key]) for key, value in kernel.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["training.pt"]


def test_checkpoint_of_other_settings_is_refused(random_l2hmc: Build, tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    first = TrainingSettings(num_iterations=1, num_chains=5)
    train_sampler(random_l2hmc(2), TARGET, initial, first, checkpoint=path)
    other = TrainingSettings(num_iterations=1, num_chains=5, jump_scale=2.0)
    with pytest.raises(ValueError, match=r"training\.pt is of .* other settings") as error:
        train_sampler(random_l2hmc(2), TARGET, initial, other, checkpoint=path)
    assert "\n" not in str(error.value)


def test_checkpoint_of_another_target_is_refused(random_l2hmc: Build, tmp_path: Path) -> None:
    path, settings = tmp_path / "training.pt", TrainingSettings(num_iterations=1, num_chains=5)
    train_sampler(random_l2hmc(2), TARGET, initial, settings, checkpoint=path)
    other, kernel = GaussianTarget(CENTRE, 1.01 * SCALES @ SCALES.T), random_l2hmc(2, seed=1)
    before = {key: value.clone() for key, value in kernel.state_dict().items()}
    with pytest.raises(ValueError, match=r"training\.pt is of .* another target") as error:
        train_sampler(kernel, other, initial, settings, checkpoint=path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in kernel.state_dict().items())


def test_checkpoint_of_an_earlier_version_is_refused(random_l2hmc: Build, tmp_path: Path) -> None:
    path, settings = tmp_path / "training.pt", TrainingSettings(num_iterations=1, num_chains=5)
    train_sampler(random_l2hmc(2), TARGET, initial, settings, checkpoint=path)
    content = torch.load(path, weights_only=True)
    del content["start_energy"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"training\.pt was written by an earlier version; remove"):
        train_sampler(random_l2hmc(2), TARGET, initial, settings, checkpoint=path)


def test_start_of_non_finite_energy_is_refused(random_l2hmc: Build) -> None:
    def energy(position: Tensor) -> Tensor:
        return torch.where(position[:, 0] > 0, torch.nan, TARGET(position))

    with pytest.raises(ValueError, match=r"not finite at the start of \d of the chains"):
        train_sampler(random_l2hmc(2), energy, initial, TrainingSettings(1, 10))


def test_temperature_falls_geometrically_to_one() -> None:
    settings = TrainingSettings(initial_temperature=16.0, annealing_iterations=4)
    found = [settings.temperature(iteration) for iteration in range(6)]
    assert found == pytest.approx([16.0, 8.0, 4.0, 2.0, 1.0, 1.0])
    assert TrainingSettings(initial_temperature=16.0).temperature(0) == 1.0


def test_chains_of_an_iteration_run_at_its_temperature() -> None:
    kernel = Recording()
    settings = TrainingSettings(5, 6, initial_temperature=16.0, annealing_iterations=4)
    train_sampler(kernel, TARGET, initial, settings)
    for temperature, (start, after, _) in zip((16, 8, 4, 2, 1), kernel.steps, strict=True):
        for state in (start, after):
            torch.testing.assert_close(state.energy, TARGET(state.position) / temperature)


def test_the_temperature_is_where_the_parameters_are(random_l2hmc: Build) -> None:
    training = _Training(random_l2hmc(2).float(), TARGET, initial, TrainingSettings(1, 5))
    assert training.energy.temperature.dtype == torch.float32


def test_learning_rate_decays_by_its_factor_each_thousand_iterations() -> None:
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    try:
        settings = TrainingSettings(4, 3, learning_rate=0.01, learning_rate_decay=0.5**1000)
        train_sampler(Recording(), TARGET, initial, settings)
    finally:
        hook.remove()
    assert rates == pytest.approx([0.01, 0.005, 0.0025, 0.00125])


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_chains_persist_beside_fresh_draws_of_the_initial_distribution(weight: float) -> None:
    kernel, drawn = Recording(), []

    def recorded(count: int, generator: torch.Generator) -> Tensor:
        drawn.append(initial(count, generator))
        return drawn[-1]

    history = train_sampler(
        kernel, TARGET, recorded, TrainingSettings(4, 6, initial_weight=weight, jump_scale=0.5)
    )
    persistent = drawn[0]
    for index, (start, after, info) in enumerate(kernel.steps):
        fresh = drawn[index + 1 :][:1] if weight else []
        assert torch.equal(start.position, torch.cat([persistent, *fresh]))
        jump = (info.proposal - start.position).square().sum(dim=-1)
        losses = reciprocal_jump_loss(jump, info.acceptance, 0.5).double()
        expected = losses[:6].mean() + (weight * losses[6:].mean() if weight else 0.0)
        assert history.loss[index].item() == pytest.approx(expected.item(), rel=1e-5)
        assert history.acceptance[index].item() == pytest.approx(info.acceptance.mean().item())
        persistent = after.position[:6]
    assert len(drawn) == (5 if weight else 1)
    assert len(torch.cat(drawn).unique(dim=0)) == 6 * len(drawn)


def test_randomness_is_a_function_of_the_seed(random_l2hmc: Build) -> None:
    def train(seed: int) -> TrainingHistory:
        settings = TrainingSettings(3, 5, initial_weight=1.0, seed=seed)
        return train_sampler(random_l2hmc(2), TARGET, initial, settings)

    first = train(0)
    torch.manual_seed(99)
    assert_same(train(0), first)
    assert not torch.equal(train(1).loss, first.loss)


def inverse_metric(metric: str, draws: Tensor) -> Tensor:
    covariance = torch.cov(draws.T, correction=0)
    return {
        "plain": torch.eye(2),
        "deviation": covariance.diagonal().diag().inverse(),
        "covariance": covariance.inverse(),
    }[metric]


@pytest.mark.parametrize("metric", ["plain", "deviation", "covariance"])
def test_jumps_are_measured_in_the_metric_of_the_draws_before(metric: Any) -> None:
    kernel = Recording()
    history = train_sampler(kernel, TARGET, initial, TrainingSettings(6, 7, metric=metric))
    draws = [kernel.steps[0][0].position]
    for index, (start, after, info) in enumerate(kernel.steps):
        moved = info.proposal - start.position
        squared = (moved @ inverse_metric(metric, torch.cat(draws)) * moved).sum(dim=-1)
        expected = (squared * info.acceptance).mean().item()
        assert history.jump[index].item() == pytest.approx(expected, rel=1e-5)
        loss = reciprocal_jump_loss(squared, info.acceptance).mean().item()
        assert history.loss[index].item() == pytest.approx(loss, rel=1e-4)
        draws.append(after.position)


def test_squares_metric_adds_the_jump_of_the_whitened_squares() -> None:
    kernel = Recording()
    history = train_sampler(kernel, TARGET, initial, TrainingSettings(6, 7, metric="squares"))
    draws = [kernel.steps[0][0].position]
    for index, (start, after, info) in enumerate(kernel.steps):
        pooled = torch.cat(draws)
        factor = torch.linalg.cholesky(torch.cov(pooled.T, correction=0))
        before, proposal = (
            (each - pooled.mean(dim=0)) @ factor.inverse().T
            for each in (start.position, info.proposal)
        )
        squares = 0.5 * (proposal.square() - before.square()).square()
        jump = ((proposal - before).square() + squares).sum(dim=-1)
        expected = (jump * info.acceptance).mean().item()
        assert history.jump[index].item() == pytest.approx(expected, rel=1e-4)
        draws.append(after.position)


def test_covariance_metric_does_not_see_an_affine_map_of_the_target(random_l2hmc: Build) -> None:
    def standard_normal(position: Tensor) -> Tensor:
        return 0.5 * position.square().sum(dim=-1)

    def mapped(count: int, generator: torch.Generator) -> Tensor:
        return CENTRE + initial(count, generator) @ SCALES.T

    def train(metric: Any) -> tuple[TrainingHistory, TrainingHistory]:
        settings = TrainingSettings(8, 6, metric=metric, initial_weight=0.5, learning_rate=0.01)
        straight, inside = random_l2hmc(2), random_l2hmc(2)
        histories = (
            train_sampler(straight, standard_normal, initial, settings),
            train_sampler(Preconditioned(inside, CENTRE, SCALES), TARGET, mapped, settings),
        )
        if metric == "covariance":
            torch.testing.assert_close(inside.state_dict(), straight.state_dict())
        return histories

    plain, plain_mapped = train("plain")
    assert not torch.allclose(plain.jump, plain_mapped.jump, rtol=0.01)
    torch.testing.assert_close(*map(without_durations, train("covariance")))


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_non_finite_gradient_leaves_the_parameters_alone_and_is_counted(factor: float) -> None:
    kernel, factors = Recording(), [1.0, factor, 1.0]
    gradients = iter(factors)
    kernel.log_step_size.register_hook(lambda gradient: gradient * next(gradients))
    kept = []

    def keep(iterations: int) -> None:
        kept.append([parameter.detach().clone() for parameter in kernel.parameters()])

    history = train_sampler(kernel, TARGET, initial, TrainingSettings(3, 5), progress=keep)
    assert history.skipped.tolist() == [0.0, 1.0, 0.0]
    changed = [not all(map(torch.equal, before, after)) for before, after in pairwise(kept)]
    assert changed == [True, False, True]
    assert history.loss.isfinite().all()


def test_parameters_that_are_not_the_samplers_or_frozen_stay_alone(random_l2hmc: Build) -> None:
    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.precision = torch.nn.Parameter(torch.ones(2))

        def forward(self, position: Tensor) -> Tensor:
            return (self.precision * position.square()).sum(dim=-1)

    energy, kernel = Learned(), random_l2hmc(2)
    frozen = kernel.log_step_size.requires_grad_(False)
    train_sampler(kernel, energy, initial, TrainingSettings(2, 5))
    assert energy.precision.grad is None
    assert frozen.grad is None
    assert kernel.momentum_network.inputs.weight.grad is not None


def test_training_lowers_the_loss_and_lengthens_the_jumps() -> None:
    kernel = L2HMC(2, num_leapfrogs=3, step_size=0.1, hidden=8)
    target = GaussianTarget(torch.zeros(2), torch.eye(2))
    # With a short λ the loss is nearly -δA/λ², without the heavy tail of its reciprocal.
    settings = TrainingSettings(150, 100, jump_scale=0.1, learning_rate=0.03)
    history = train_sampler(kernel, target, target.sample, settings)
    assert all(field.shape == (150,) for field in history)
    for sign, field in ((-1, history.loss), (1, history.jump)):
        first, last = field[:20], field[-20:]
        error = (first.var() / 20 + last.var() / 20).sqrt()
        assert sign * (last.mean() - first.mean()) > 5 * error
    assert history.step_size[0] == pytest.approx(0.1, rel=0.04)
    assert history.skipped.sum() == history.diverging.sum() == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_iterations", 0),
        ("num_chains", 0),
        ("jump_scale", 0.0),
        ("jump_scale", math.nan),
        ("initial_weight", -0.1),
        ("initial_weight", math.nan),
        ("metric", "variance"),
        ("initial_temperature", 0.0),
        ("annealing_iterations", -1),
        ("learning_rate", -1e-3),
        ("learning_rate_decay", 0.0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must .*{value}") as error:
        TrainingSettings(**{name: value})
    assert "\n" not in str(error.value)


def test_kernel_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters to train"):
        train_sampler(HMC(), TARGET, initial, TrainingSettings(1, 5))


@pytest.mark.parametrize(("metric", "enough"), [("deviation", 2), ("covariance", 3)])
def test_metric_of_too_few_chains_is_refused(random_l2hmc: Build, metric: Any, enough: int) -> None:
    train_sampler(random_l2hmc(2), TARGET, initial, TrainingSettings(1, enough, metric=metric))
    with pytest.raises(ValueError, match=rf"{metric}.* needs at least {enough} chains, got"):
        train_sampler(
            random_l2hmc(2), TARGET, initial, TrainingSettings(1, enough - 1, metric=metric)
        )


def test_chains_that_start_at_one_point_are_refused_by_metrics_of_their_covariance(
    random_l2hmc: Build,
) -> None:
    settings = TrainingSettings(1, 5, metric="covariance")
    with pytest.raises(ValueError, match="start apart in all directions"):
        train_sampler(random_l2hmc(2), TARGET, lambda n, g: torch.zeros(n, 2), settings)


def test_mixed_moments_are_those_of_all_batches() -> None:
    batches = torch.randn(4, 5, 3) * torch.tensor([1.0, 2.0, 3.0]) + torch.randn(4, 1, 3)
    moments = Moments.of(batches[0])
    for count, batch in enumerate(batches[1:], start=2):
        moments = moments.mixed(Moments.of(batch), 1 / count)
    pooled = batches.flatten(0, 1)
    torch.testing.assert_close(moments.mean, pooled.mean(dim=0))
    torch.testing.assert_close(moments.covariance, torch.cov(pooled.T, correction=0))


@pytest.mark.parametrize("content", [b"", b"PK\3\4 and so on", b"\x80\x02cos\nsystem\n."])
def test_damaged_checkpoint_is_refused_in_one_line(
    random_l2hmc: Build, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "training.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"training\.pt cannot be gone on from") as error:
        train_sampler(
            random_l2hmc(2), TARGET, initial, TrainingSettings(1, num_chains=5), checkpoint=path
        )
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content
