import math
from collections.abc import Callable
from dataclasses import replace
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
    Noise,
    Preconditioned,
    State,
    TrainingSettings,
    Turns,
    reciprocal_jump_loss,
    train_sampler,
)
from samplers.training import TrainingHistory, _Training

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

    def step(
        self, state: State, energy: Energy, noise: Noise, context: Tensor | None = None
    ) -> tuple[State, Info]:
        after, info = super().step(state, energy, noise, context)
        self.steps.append((state, after, info))
        return after, info


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
@pytest.mark.parametrize(
    ("objective", "way", "stops"),
    [
        ("siblings", "fails", [2]),
        ("jumps", "is stopped", [2]),
        ("reciprocal", "is stopped", [5]),
        ("siblings", "is stopped", [10]),
        ("jumps", "fails", [10]),
        ("siblings", "fails", [3, 6, 9]),
        ("reciprocal", "fails", [3, 6, 9]),
        ("jumps", "is stopped", [3, 6, 9]),
    ],
)
def test_resumed_training_repeats_the_uninterrupted_one(
    random_l2hmc: Build,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    objective: Any,
    way: str,
    stops: list[int],
) -> None:
    monkeypatch.setattr("samplers.training._SAVE_INTERVAL", 4)
    settings = TrainingSettings(
        num_iterations=10,
        num_chains=5,
        objective=objective,
        initial_weight=0.5 if objective == "reciprocal" else 0.0,
        initial_temperature=4.0,
        annealing_iterations=3,
        seed=3,
    )

    def build(seed: int = 0) -> Preconditioned:
        return Preconditioned(random_l2hmc(2, seed=seed), torch.zeros(2), torch.eye(2))

    whole, path = build(), tmp_path / "training.pt"
    expected = train_sampler(whole, TARGET, initial, settings)
    kernel = build()
    for stop in stops:
        progress = stop_after(stop) if way == "is stopped" else lambda count: None
        with pytest.MonkeyPatch.context() as patch:
            if way == "fails":
                fail_in(stop, patch)
            with pytest.raises(Stopped):
                train_sampler(kernel, TARGET, initial, settings, checkpoint=path, progress=progress)
        done = (stop - 1) // 4 * 4 if way == "fails" else stop
        kernel = build(seed=int(path.exists()))
    counts: list[int] = []
    found = train_sampler(
        kernel, TARGET, initial, settings, checkpoint=path, progress=counts.append
    )
    assert counts[0] == done
    assert sum(counts) == 10
    assert_same(found, expected)
    trained = whole.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in kernel.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["training.pt"]


def copied(kernel: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in kernel.state_dict().items()}


def test_checkpoint_that_does_not_fit_is_refused_in_one_line(
    random_l2hmc: Build, tmp_path: Path
) -> None:
    path, settings = tmp_path / "training.pt", TrainingSettings(num_iterations=1, num_chains=5)
    train_sampler(random_l2hmc(2), TARGET, initial, settings, checkpoint=path)
    kernel = random_l2hmc(2, seed=1)
    before = copied(kernel)
    for other in (random_l2hmc(2, hidden=3), Preconditioned(kernel, CENTRE, SCALES)):
        with pytest.raises(ValueError, match=r"^.*training\.pt is of another run \(kernel\."):
            train_sampler(other, TARGET, initial, settings, checkpoint=path)

    def refused(message: str, target: Energy = TARGET, **changes: Any) -> None:
        changed = replace(settings, **changes)
        with pytest.raises(ValueError, match=rf"^.*training\.pt .*{message}.*$"):
            train_sampler(kernel, target, initial, changed, checkpoint=path)
        torch.testing.assert_close(kernel.state_dict(), before, rtol=0, atol=0)

    refused("curvature_length was 0.2, is now 2.0", curvature_length=2.0)
    refused("another target", GaussianTarget(CENTRE, 1.01 * SCALES @ SCALES.T))
    for content in (b"", b"PK\3\4 and so on", b"\x80\x02cos\nsystem\n."):
        path.write_bytes(content)
        refused("cannot be gone on from")
        assert path.read_bytes() == content


def test_chains_of_an_iteration_run_at_its_temperature() -> None:
    kernel = Recording()
    settings = TrainingSettings(5, 6, "jumps", initial_temperature=16.0, annealing_iterations=4)
    train_sampler(kernel, TARGET, initial, settings)
    for temperature, (start, after, _) in zip((16, 8, 4, 2, 1), kernel.steps, strict=True):
        for state in (start, after):
            torch.testing.assert_close(state.energy, TARGET(state.position) / temperature)


def test_learning_rate_falls_as_a_cosine() -> None:
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    try:
        settings = TrainingSettings(4, 3, learning_rate=0.01, final_learning_rate=0.2)
        train_sampler(Recording(), TARGET, initial, settings)
    finally:
        hook.remove()
    half = math.sqrt(0.5)
    expected = [0.002 + 0.008 * 0.5 * (1 + cosine) for cosine in (1, half, 0, -half)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_chains_persist_beside_fresh_draws_of_the_initial_distribution(weight: float) -> None:
    kernel, drawn = Recording(), []

    def recorded(count: int, generator: torch.Generator) -> Tensor:
        drawn.append(initial(count, generator))
        return drawn[-1]

    history = train_sampler(
        kernel,
        TARGET,
        recorded,
        TrainingSettings(4, 6, "reciprocal", initial_weight=weight, jump_scale=0.5),
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


def test_another_seed_is_another_training(random_l2hmc: Build) -> None:
    settings = (TrainingSettings(3, 5, "reciprocal", seed=seed) for seed in (0, 1))
    losses = [train_sampler(random_l2hmc(2), TARGET, initial, each).loss for each in settings]
    assert (losses[0] != losses[1]).all()


def standard_normal(position: Tensor) -> Tensor:
    return 0.5 * position.square().sum(dim=-1)


def mapped(count: int, generator: torch.Generator) -> Tensor:
    return CENTRE + initial(count, generator) @ SCALES.T


@pytest.mark.parametrize("objective", ["siblings", "jumps", "reciprocal"])
@pytest.mark.parametrize("curvature_length", [0.0, 0.2])
def test_a_kernel_in_other_coordinates_is_trained_in_them(
    random_l2hmc: Build, objective: Any, curvature_length: float
) -> None:
    settings = TrainingSettings(8, 12, objective, rewhiten=False, curvature_length=curvature_length)
    straight, inside = random_l2hmc(2), random_l2hmc(2)
    found = train_sampler(Preconditioned(inside, CENTRE, SCALES), TARGET, mapped, settings)
    expected = train_sampler(straight, standard_normal, initial, settings)
    torch.testing.assert_close(without_durations(found), without_durations(expected))
    torch.testing.assert_close(inside.state_dict(), straight.state_dict())


@pytest.mark.parametrize("annealing", [0, 7])
def test_coordinates_become_the_moments_of_the_chains_at_temperature_one(annealing: int) -> None:
    kernel, drawn = Preconditioned(Recording(), torch.zeros(2), torch.eye(2)), []
    kernel.kernel.head_scale = 0.1
    temperature = 1.5 if annealing else 1.0
    settings = TrainingSettings(
        10,
        50,
        initial_temperature=temperature,
        annealing_iterations=annealing,
        learning_rate=1e-4,
    )

    def follow(done: int) -> None:
        if done:
            _, after, _ = kernel.kernel.steps[-1]
            # At this point the coordinates may be those after the iteration already.
            drawn.append((before[0] + after.position @ before[1].T).detach())
        before[:] = [kernel.location.clone(), kernel.factor.clone()]
        found.append(before[:])

    before: list[Tensor] = []
    found: list[list[Tensor]] = []
    train_sampler(kernel, TARGET, mapped, settings, progress=follow)
    changed = [i for i, (a, b) in enumerate(pairwise(found)) if not torch.equal(a[0], b[0])]
    assert changed == ([7, 8] if annealing else [1, 3, 5, 7, 8])
    pooled = torch.cat(drawn[7:8] if annealing else drawn[:8])
    location, factor = found[8]
    torch.testing.assert_close(location, pooled.mean(dim=0))
    # Shrunk as by five draws of a thousandth of the variance.
    torch.testing.assert_close(factor @ factor.T, pooled.T.cov(correction=0), rtol=0.1, atol=0.05)


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


@pytest.mark.parametrize("objective", ["siblings", "jumps", "reciprocal"])
def test_training_raises_the_score(objective: Any) -> None:
    kernel = L2HMC(2, num_leapfrogs=2, step_size=0.1, hidden=8)
    target = GaussianTarget(torch.zeros(2), torch.eye(2))
    settings = TrainingSettings(100, 60, objective, learning_rate=0.03)
    if objective == "reciprocal":
        # With a short λ the loss is nearly -δA/λ², without the heavy tail of its reciprocal.
        settings = replace(settings, jump_scale=0.1)
    history = train_sampler(kernel, target, target.sample, settings)
    assert all(field.shape == (100,) for field in history)
    first, last = history.score[:20], history.score[-20:]
    error = (first.var() / 20 + last.var() / 20).sqrt()
    assert last.mean() - first.mean() > 5 * error
    assert history.step_size[0] == pytest.approx(0.1, rel=0.04)
    assert history.skipped.sum() == history.diverging.sum() == 0


def test_siblings_are_two_proposals_of_one_chain_and_the_first_goes_on() -> None:
    kernel = Recording()
    train_sampler(kernel, TARGET, initial, TrainingSettings(4, 6))
    for (start, after, info), (following, _, _) in pairwise(kernel.steps):
        one, other = start.position.split(6)
        assert torch.equal(one, other)
        assert not torch.equal(*info.proposal.split(6))
        assert torch.equal(following.position[:6], after.position[:6])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_iterations", 0),
        ("num_chains", 0),
        ("jump_scale", 0.0),
        ("jump_scale", math.nan),
        ("initial_weight", -0.1),
        ("initial_weight", math.nan),
        ("objective", "variance"),
        ("curvature_length", -0.1),
        ("initial_temperature", 0.0),
        ("annealing_iterations", -1),
        ("learning_rate", -1e-3),
        ("final_learning_rate", -0.1),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must .*{value}") as error:
        TrainingSettings(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jump_scale": 2.0}, "^jump_scale is of the objective 'reciprocal', not 'siblings'"),
        ({"objective": "jumps", "initial_weight": 1.0}, "^initial_weight is of the objective"),
        ({"initial_temperature": 10.0}, "^annealing takes both .* got 10.0 and 0$"),
        ({"annealing_iterations": 10}, "^annealing takes both .* got 1.0 and 10$"),
        (
            {"num_iterations": 5, "annealing_iterations": 5, "initial_temperature": 2.0},
            "^annealing_iterations must be fewer than num_iterations.* got 5 of 5$",
        ),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**settings)


def half_of_nan(position: Tensor) -> Tensor:
    return torch.where(position[:, 0] > 0, torch.nan, TARGET(position))


def on_a_line(count: int, generator: torch.Generator) -> Tensor:
    return torch.stack([torch.randn(count), torch.full((count,), 0.1)], dim=1)


@pytest.mark.parametrize(
    ("build", "energy", "start", "message"),
    [
        (HMC, TARGET, initial, "HMC has no parameters to train: use adapt"),
        (lambda: Recording().requires_grad_(False), TARGET, initial, r"requires_grad_\(True\)"),
        (lambda: Turns([Recording(), HMC()]), TARGET, initial, "train each kernel before they"),
        (Recording, half_of_nan, initial, r"not finite at the start of \d of the chains"),
        (Recording, TARGET, on_a_line, "start apart in every coordinate"),
        (Recording, TARGET, lambda n, g: initial(3, g), "asked for 5 starts, initial drew 3"),
        (Recording, TARGET, torch.randn(5, 2), "function of a count and a generator .* got Tensor"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    build: Any, energy: Energy, start: Any, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        train_sampler(build(), energy, start, TrainingSettings(1, 5))


def test_jumps_need_no_spread() -> None:
    train_sampler(Recording(), TARGET, on_a_line, TrainingSettings(1, 5, "jumps"))
