"""Every kernel that learn can return is exact; learn chooses by what a race shows."""

import subprocess
import sys
from collections.abc import Callable
from copy import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from samplers import (
    HMC,
    L2HMC,
    TARGETS,
    Endpoint,
    Energy,
    Flow,
    GaussianMixture,
    GaussianTarget,
    Independence,
    Kernel,
    Learned,
    Noise,
    PhasePoint,
    Preconditioned,
    Turns,
    flows,
    learn,
    sample,
    seeded_generator,
)
from samplers.flows import fit_flow
from samplers.race import race, tune_hmc

Build = Callable[..., L2HMC]
SHAPE = 1.5
FACTOR = torch.tensor([[0.8, 0.0], [0.5, 1.2]], dtype=torch.float64)
CENTRE = torch.tensor([0.3, -0.2], dtype=torch.float64)


def skewed(position: Tensor) -> Tensor:
    """Logarithms of Gamma(3/2) numbers."""
    return (position.exp() - SHAPE * position).sum(dim=-1)


def exact_draws(count: int, seed: int = 0) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.distributions.Gamma(SHAPE, 1.0).sample((count, 2)).to(torch.float64).log()


def in_flow(kernel: Kernel) -> Flow:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Flow(kernel, CENTRE, FACTOR, num_couplings=4, hidden=8).double()


def kernels(build: Build) -> dict[str, Kernel]:
    learned = build(2, 2)
    return {
        "affine": Preconditioned(learned, CENTRE, FACTOR),
        "flow": in_flow(learned),
        "HMC in a flow": in_flow(HMC(2, 0.4)),
        "independence": Preconditioned(Independence(), CENTRE, FACTOR),
        "independence from a flow": in_flow(Independence()),
    }


NAMES = ["affine", "flow", "HMC in a flow", "independence", "independence from a flow"]


def noise_of(kernel: Kernel, position: Tensor, seed: int = 0) -> Noise:
    return kernel.noise(kernel.init(position, skewed), seeded_generator("cpu", seed))


@pytest.mark.parametrize("name", NAMES)
def test_the_opposite_direction_undoes_a_trajectory(random_l2hmc: Build, name: str) -> None:
    kernel, position = kernels(random_l2hmc)[name], exact_draws(20)
    noise = noise_of(kernel, position)
    end, momentum, there = kernel.trajectory(position, noise.momentum, noise.direction, skewed)
    back, again, log_det = kernel.trajectory(end, momentum, -noise.direction, skewed)
    torch.testing.assert_close(back, position, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(again, noise.momentum, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(log_det, -there, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_log_determinant_is_that_of_the_jacobian(
    random_l2hmc: Build, name: str, direction: float
) -> None:
    kernel, step = kernels(random_l2hmc)[name], 1e-6
    point = torch.cat([exact_draws(1)[0], torch.tensor([0.4, -0.7])])
    shifted = torch.cat([point[None], point + step * torch.eye(4), point - step * torch.eye(4)])
    ways = torch.full((9,), direction)
    position, momentum, log_det = kernel.trajectory(shifted[:, :2], shifted[:, 2:], ways, skewed)
    ends = torch.cat([position, momentum], dim=1)
    jacobian = (ends[1:5] - ends[5:]) / (2 * step)
    torch.testing.assert_close(jacobian.det().abs().log(), log_det[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "turns"])
def test_a_skewed_density_is_left_invariant(random_l2hmc: Build, name: str) -> None:
    found = kernels(random_l2hmc)
    kernel = found.get(name) or Turns([found["flow"], Preconditioned(HMC(2, 0.5), CENTRE, FACTOR)])
    start = exact_draws(40_000)
    state = kernel.init(start, skewed)
    with torch.no_grad():
        after, info = kernel.step(state, skewed, kernel.noise(state, seeded_generator("cpu", 3)))
    assert info.acceptance.mean() > 0.1
    for power in (1, 2, 3):
        change = after.position**power - start**power
        error = change.std(dim=0) / len(change) ** 0.5
        assert (change.mean(dim=0).abs() < 5 * error).all()
    torch.testing.assert_close(after.energy, skewed(after.position))


def test_the_independence_sampler_accepts_by_the_ratio_of_importance_weights() -> None:
    kernel, position = Independence(), exact_draws(10)
    state = kernel.init(position, skewed)
    noise = noise_of(kernel, position)
    _, info = kernel.step(state, skewed, noise)
    assert torch.equal(info.proposal, noise.momentum)
    weight = [0.5 * x.square().sum(dim=1) - skewed(x) for x in (noise.momentum, position)]
    torch.testing.assert_close(info.acceptance, (weight[0] - weight[1]).exp().clamp(max=1))


def test_a_flow_whose_inverse_is_inexact_rejects(
    random_l2hmc: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, position = in_flow(random_l2hmc(2, 1)), exact_draws(30)
    assert kernel.inverse_error(position).max() < 1e-10
    state = kernel.init(position, skewed)
    monkeypatch.setattr(flows, "INVERSE_TOLERANCE", 0.0)
    after, info = kernel.step(state, skewed, kernel.noise(state))
    assert info.diverging.all()
    assert torch.equal(after.position, position)


def test_a_flow_gains_on_a_banana_and_not_on_a_gaussian() -> None:
    gaussian = GaussianTarget(CENTRE, FACTOR @ FACTOR.T)
    gains = []
    for target in (TARGETS["banana"](), gaussian):
        draws = target.sample(3000, seeded_generator("cpu", 0))
        factor = torch.linalg.cholesky(draws.T.cov())
        torch.manual_seed(0)
        flow = Flow(HMC(), draws.mean(dim=0), factor, hidden=16).double()
        generator = seeded_generator("cpu", 1)
        gains.append(fit_flow(flow, draws, 400, learning_rate=5e-3, generator=generator))
    assert gains[0] > 0.3
    assert gains[1] < 0.02


@pytest.mark.parametrize("name", [*NAMES, "turns"])
def test_compiling_changes_no_draw_and_no_other_kernel(random_l2hmc: Build, name: str) -> None:
    found = kernels(random_l2hmc)
    kernel = found.get(name) or Turns([found["flow"], found["affine"]])
    position, moving = exact_draws(5), copy(kernel)
    moving.compile(backend="aot_eager")
    draws = [
        sample(each, skewed, position, 2, generator=seeded_generator("cpu", 0)).draws
        for each in (kernel, moving)
    ]
    torch.testing.assert_close(draws[1], draws[0], rtol=1e-9, atol=1e-9)
    assert not any(each.is_compiled for each in kernel.modules() if isinstance(each, Kernel))


class Stuck(Kernel):
    """HMC some of whose chains never move."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.num_leapfrogs, self.share = 1, share
        self.register_buffer("log_step_size", torch.zeros(()))

    def integrate(self, start: PhasePoint, energy: Energy, context: object = None) -> Endpoint:
        end = HMC(1, 1.4).integrate(start, energy)
        stuck = torch.arange(len(start.momentum)) < self.share * len(start.momentum)
        return end._replace(log_determinant=end.log_determinant.masked_fill(stuck, torch.nan))


def normal(position: Tensor) -> Tensor:
    return 0.5 * position.square().sum(dim=-1)


@pytest.mark.parametrize(
    ("first", "other", "best"),
    [
        (HMC(1, 1.4), HMC(1, 1.4), "first"),  # as good is not better
        (HMC(8, 0.3), HMC(1, 1.4), "other"),
        (HMC(1, 1.4), HMC(8, 0.3), "first"),
        (HMC(8, 0.3), Stuck(0.01), "first"),
    ],
)
def test_the_first_kernel_gives_way_only_to_a_surely_better_one(
    first: Kernel, other: Kernel, best: str
) -> None:
    start = torch.randn(100, 2, generator=seeded_generator("cpu", 0))
    found = race({"first": first, "other": other}, normal, start, 600, seeded_generator("cpu", 1))
    assert found.best == best
    assert found.converged


def test_chains_that_never_move_are_counted_and_do_not_converge() -> None:
    start = torch.randn(100, 2, generator=seeded_generator("cpu", 0))
    found = race({"stuck": Stuck(0.03)}, normal, start, 400, seeded_generator("cpu", 1))
    assert found.table.row("stuck")["stuck"] == 3
    assert not found.converged


SCG = TARGETS["scg"]().float()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learn") / "stages"


def start(count: int = 40) -> Tensor:
    return 3 * torch.randn(count, 2, generator=seeded_generator("cpu", 5), dtype=torch.float32)


@pytest.fixture(scope="module")
def learned(checkpoint: Path) -> Learned:
    return learn(SCG, start(), budget=800_000, seed=4, checkpoint=checkpoint, progress=False)


def test_learning_beats_tuned_hmc_on_a_correlated_gaussian_and_says_so(learned: Learned) -> None:
    row, hmc = learned.table.row(learned.chosen), learned.table.row("HMC")
    assert learned.chosen == "learned"
    assert learned.converged
    assert row["ess_per_gradient"] > 0.8 > 1.3 * hmc["ess_per_gradient"]
    assert learned.training_gradients > 100_000
    assert 0 < learned.pays_after < float("inf")
    assert "independence sampler mixes as well" in learned.message
    draws = sample(learned.kernel, SCG, learned.position, 200).draws
    for power in (1, 2):
        value = (draws.double() ** power).mean(dim=1)
        exact = 0 if power == 1 else SCG.covariance.diagonal()
        assert ((value.mean(dim=0) - exact).abs() < 5 * value.std(dim=0) / 10).all()


def test_a_finished_learning_is_read_back(learned: Learned, checkpoint: Path) -> None:
    calls = []

    def energy(position: Tensor) -> Tensor:
        calls.append(len(position))
        return SCG(position)

    again = learn(energy, start(), budget=800_000, seed=4, checkpoint=checkpoint, progress=False)
    assert sum(calls) <= 100  # to see that the target is the same
    assert again.message == learned.message
    with pytest.raises(ValueError, match=r"of another run .seed was 4, is now 5"):
        learn(SCG, start(), budget=800_000, seed=5, checkpoint=checkpoint, progress=False)


def test_a_learned_kernel_is_saved_and_loaded_in_a_fresh_process(
    learned: Learned, tmp_path: Path
) -> None:
    path = tmp_path / "learned.pt"
    learned.save(path)
    generator = torch.Generator().manual_seed(0)
    expected = sample(learned.kernel, SCG, learned.position, 3, generator=generator).draws
    code = (
        "import sys, torch; from samplers import TARGETS, Learned, sample;"
        "found = Learned.load(sys.argv[1]);"
        "generator = torch.Generator().manual_seed(0);"
        "energy = TARGETS['scg']().float();"
        "print(sample(found.kernel, energy, found.position, 3, generator=generator).draws"
        ".double().sum().item(), found.message)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    total, _, message = found.stdout.partition(" ")
    assert float(total) == pytest.approx(expected.double().sum().item(), rel=1e-5)
    assert message.strip() == learned.message


@pytest.mark.slow
def test_chains_that_do_not_visit_both_modes_as_they_should_are_told_of() -> None:
    target = GaussianMixture([[-20.0, 0.0], [20.0, 0.0]], [1.0, 0.1]).float()
    draws = target.sample(400, torch.Generator().manual_seed(0))
    draws = draws[draws[:, 0].argsort()]
    uneven = torch.cat([draws[:80], draws[-20:]])  # each mode is to have one half
    found = learn(target, uneven, budget=800_000, seed=4, progress=False)
    assert found.converged != ("Nothing converged" in found.message)
    if found.converged:
        generator = torch.Generator().manual_seed(1)
        chains = sample(found.kernel, target, found.position, 2000, generator=generator)
        right = (chains.draws[:, :, 0] > 0).double().mean(dim=1)
        assert (right.mean() - 0.5).abs() < 5 * right.std() / len(right) ** 0.5


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="budget must be at least 800000 gradients, got 10"):
        learn(SCG, start(), budget=10)


@pytest.mark.slow
def test_one_start_in_one_dimension_and_double_precision_is_enough() -> None:
    def energy(position: Tensor) -> Tensor:
        return (position.exp() - SHAPE * position).sum(dim=-1)

    found = learn(energy, torch.zeros(1, 1, dtype=torch.float64), budget=800_000, progress=False)
    assert found.converged
    assert found.position.shape == (100, 1)
    assert found.position.dtype == torch.float64
    assert found.table.row(found.chosen)["ess_per_gradient"] > 0.6


def test_hmc_is_tuned_beyond_the_step_size_that_acceptance_asks_for() -> None:
    # One leapfrog of ε = 1.3, accepted half of the time, has .37 independent draws a gradient on
    # this target; of ε = 1 it has .24, and of two leapfrogs none has more than .27.
    target = TARGETS["rough_well"]()
    position = target.sample(100, seeded_generator("cpu", 0))
    warm = Preconditioned(HMC(5, 0.5), torch.zeros(2), torch.ones(2))
    tuned = tune_hmc(warm, target, position, 150, seeded_generator("cpu", 1))
    assert tuned.num_leapfrogs == 1
    assert 1.15 < float(tuned.step_size) < 1.55
