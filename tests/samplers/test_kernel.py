"""One property suite over every kernel: what the contract of ``Kernel`` promises."""

import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from samplers import (
    HMC,
    L2HMC,
    Endpoint,
    Energy,
    Info,
    Kernel,
    Noise,
    PhasePoint,
    State,
    seeded_generator,
    value_and_gradient,
)
from samplers.energy import fresh_leaf
from samplers.kernel import RoundTrip

CHAINS = 6
Build = Callable[..., Kernel]
PlainEnergy = Callable[[Tensor], Tensor]


@pytest.fixture(params=["hmc", "l2hmc", "l2hmc with context"])
def build(request: pytest.FixtureRequest, random_l2hmc: Callable[..., Kernel]) -> Build:
    """A builder of kernels of a dimension and a number of leapfrogs, accepted 50 to 80 % here."""

    def build(dim: int = 3, num_leapfrogs: int = 4) -> Kernel:
        if request.param == "hmc":
            return HMC(num_leapfrogs, step_size=0.7)
        observed = {"observation_dim": 4, "embedding_hidden": (5,)}
        observed = observed if "context" in request.param else {}
        return random_l2hmc(dim, num_leapfrogs, step_size=0.1, **observed)

    return build


class Path(NamedTuple):
    """Where the trajectories of six chains start, three in each direction."""

    kernel: Kernel
    energy: Energy
    context: Tensor | None
    position: Tensor
    momentum: Tensor
    direction: Tensor

    def follow(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.kernel.trajectory(
            self.position, self.momentum, self.direction, self.energy, self.context
        )


@pytest.fixture(
    params=[(1, 1), (1, 3), (2, 1), (2, 4), (5, 1), (5, 3)], ids="D{0[0]}-M{0[1]}".format
)
def path(request: pytest.FixtureRequest, build: Build, energy: Energy) -> Path:
    dim, num_leapfrogs = request.param
    kernel = build(dim, num_leapfrogs)
    position, momentum = torch.randn(2, CHAINS, dim).unbind()
    direction = torch.tensor([1.0, -1.0]).repeat(CHAINS // 2)
    context = kernel.embed(torch.randn(CHAINS, 4))
    return Path(kernel, energy, context, position, momentum, direction)


@torch.no_grad()
def test_opposite_direction_undoes_the_trajectory(path: Path) -> None:
    position, momentum, log_determinant = path.follow()
    assert (position - path.position).norm() > 0.1
    back = path._replace(position=position, momentum=momentum, direction=-path.direction).follow()
    expected = (path.position, path.momentum, -log_determinant)
    torch.testing.assert_close(back, expected, rtol=1e-9, atol=1e-9)


def test_log_determinant_is_that_of_the_brute_force_jacobian(path: Path) -> None:
    start = torch.cat([path.position, path.momentum], dim=-1).requires_grad_()
    position, momentum = start.chunk(2, dim=-1)
    *end, log_determinant = path._replace(position=position, momentum=momentum).follow()
    rows = [
        torch.autograd.grad(coordinate.sum(), start, retain_graph=True)[0]
        for coordinate in torch.cat(end, dim=-1).unbind(dim=-1)
    ]
    sign, expected = torch.stack(rows, dim=1).slogdet()
    assert torch.equal(sign, torch.ones(CHAINS))
    torch.testing.assert_close(log_determinant, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_hmc_preserves_volume_and_l2hmc_does_not(path: Path) -> None:
    _, _, log_determinant = path.follow()
    if isinstance(path.kernel, HMC):
        assert torch.equal(log_determinant, torch.zeros(CHAINS))
    if isinstance(path.kernel, L2HMC):
        assert log_determinant.norm() > 1e-2


def test_the_step_size_travels_with_the_kernel(build: Build) -> None:
    kernel = build()
    assert kernel.step_size.dim() == 0
    assert torch.equal(kernel.step_size, kernel.state_dict()["log_step_size"].exp())


class Run(NamedTuple):
    """All that goes into one step of many chains."""

    kernel: Kernel
    energy: PlainEnergy
    state: State
    noise: Noise
    context: Tensor | None

    def step(self, energy: Energy | None = None, **changes: Tensor) -> tuple[State, Info]:
        noise = self.noise._replace(**changes)
        return self.kernel.step(self.state, energy or self.energy, noise, self.context)


@pytest.fixture
def run(build: Build, energy: PlainEnergy) -> Run:
    kernel = build()
    state = kernel.init(torch.randn(40, 3), energy)
    noise = kernel.noise(state, seeded_generator("cpu", 1))
    return Run(kernel, energy, state, noise, kernel.embed(torch.randn(40, 4)))


def hamiltonian(energy: Energy, position: Tensor, momentum: Tensor) -> Tensor:
    return value_and_gradient(energy, position).energy + 0.5 * (momentum * momentum).sum(dim=-1)


@torch.no_grad()
def test_acceptance_is_that_of_metropolis_and_hastings(run: Run) -> None:
    _, info = run.step()
    position, momentum, log_determinant = run.kernel.trajectory(
        run.state.position, run.noise.momentum, run.noise.direction, run.energy, run.context
    )
    before = hamiltonian(run.energy, run.state.position, run.noise.momentum)
    ratio = (before - hamiltonian(run.energy, position, momentum) + log_determinant).exp()
    torch.testing.assert_close(info.proposal, position)
    torch.testing.assert_close(info.acceptance, ratio.clamp(max=1.0))
    assert (ratio < 0.9).any()
    assert (ratio > 1.1).any()
    assert not info.diverging.any()


@torch.no_grad()
def test_chains_move_to_accepted_proposals_and_else_stay(run: Run) -> None:
    state, info = run.step()
    assert info.accepted.any()
    assert not info.accepted.all()
    assert torch.equal(info.accepted, run.noise.uniform < info.acceptance)
    proposed = value_and_gradient(run.energy, info.proposal)
    for found, new, old in zip(state[:3], proposed[:3], run.state[:3], strict=True):
        assert torch.equal(found[info.accepted], new[info.accepted])
        assert torch.equal(found[~info.accepted], old[~info.accepted])


@torch.no_grad()
def test_certain_acceptance_accepts_and_certain_rejection_rejects(run: Run) -> None:
    _, info = run.step(uniform=torch.zeros(40))
    assert torch.equal(info.accepted, info.acceptance > 0)
    _, info = run.step(uniform=torch.ones(40))
    assert not info.accepted.any()


@torch.no_grad()
def test_step_is_a_pure_function_of_its_arguments(run: Run) -> None:
    before = {key: value.clone() for key, value in run.kernel.state_dict().items()}
    arguments = [tensor.clone() for tensor in (*run.state[:3], *run.noise)]
    random_state = torch.get_rng_state()
    (state, info), (again, info_again) = run.step(), run.step()
    for first, second in zip((*state[:3], *info), (*again[:3], *info_again), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(map(torch.equal, arguments, (*run.state[:3], *run.noise)))
    assert all(torch.equal(value, before[key]) for key, value in run.kernel.state_dict().items())


@torch.no_grad()
def test_noise_is_a_function_of_its_generator(run: Run) -> None:
    def noise(seed: int) -> Noise:
        return run.kernel.noise(run.state, seeded_generator("cpu", seed))

    assert all(map(torch.equal, noise(1), run.noise))
    assert not any(map(torch.equal, noise(2), run.noise))


def test_noise_has_the_distributions_it_promises() -> None:
    kernel, count = HMC(), 100_000
    state = State(torch.zeros(count, 2), torch.zeros(count), torch.zeros(count, 2))
    columns: list[Tensor] = []
    generator = seeded_generator("cpu", 0)
    for momentum, direction, uniform in (kernel.noise(state, generator) for _ in range(2)):
        assert set(direction.tolist()) == {-1.0, 1.0}
        assert uniform.min() >= 0
        assert uniform.max() < 1
        columns += [*momentum.unbind(dim=-1), direction, (uniform - 0.5) * 12**0.5]
    table = torch.stack(columns)
    assert (table.mean(dim=-1).abs() < 5 / count**0.5).all()
    # var(v²) = 2 is the largest, and no pair of columns is correlated, of one step or of both.
    assert ((table @ table.mT / count - torch.eye(8)).abs() < 5 * (2 / count) ** 0.5).all()


def test_noise_takes_the_type_of_the_positions(build: Build) -> None:
    kernel = build().float()
    state = State(torch.zeros(4, 3).float(), torch.zeros(4).float(), torch.zeros(4, 3).float())
    assert {field.dtype for field in kernel.noise(state)} == {torch.float32}


class Counting:
    def __init__(self, energy: PlainEnergy) -> None:
        self.energy, self.calls = energy, 0

    def __call__(self, position: Tensor) -> Tensor:
        self.calls += 1
        return self.energy(position)


@pytest.mark.parametrize("num_leapfrogs", [1, 4])
def test_one_gradient_at_the_start_and_one_for_each_leapfrog(
    build: Build, energy: PlainEnergy, num_leapfrogs: int
) -> None:
    kernel, counting = build(num_leapfrogs=num_leapfrogs), Counting(energy)
    context = kernel.embed(torch.randn(5, 4))
    state = kernel.init(torch.randn(5, 3), counting)
    assert counting.calls == 1
    for steps in (1, 2, 3):
        state, _ = kernel.step(state, counting, kernel.noise(state), context)
        assert counting.calls == 1 + steps * num_leapfrogs


class WithExtra:
    """An energy that keeps more of a point than a chain needs."""

    def __init__(self, energy: Energy) -> None:
        self.energy = energy

    def value_and_gradient(self, position: Tensor) -> State:
        state = value_and_gradient(self.energy, position)
        steep, parts = state.gradient[:, 0] > 0, torch.stack([position, -position], dim=-1)
        return state._replace(extra=(position.sum(dim=-1), steep, parts))


@torch.no_grad()
def test_extras_of_a_state_follow_acceptance(run: Run) -> None:
    energy = WithExtra(run.energy)
    start = run.kernel.init(run.state.position, energy)
    state, info = run._replace(state=start).step(energy)
    expected, _ = run.step()
    assert info.accepted.any()
    assert not info.accepted.all()
    assert torch.equal(state.position, expected.position)
    torch.testing.assert_close(state.extra, energy.value_and_gradient(expected.position).extra)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_steps_where_gradients_are_off(run: Run, mode: type) -> None:
    expected, expected_info = run.step()
    with mode():
        state, info = run.step()
    for found, wanted in zip((*state[:3], *info), (*expected[:3], *expected_info), strict=True):
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted.detach(), check_stride=False)


# Until torch 2.14 the compiler does itself what it warns of here.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_step_compiles_without_a_graph_break(build: Build, energy: Energy) -> None:
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run here")
    kernel = build(num_leapfrogs=2)
    state, observations = kernel.init(torch.randn(5, 3), energy), torch.randn(5, 4)
    noise = kernel.noise(state)

    def step() -> tuple[State, Info]:
        return kernel.step(state, energy, noise, kernel.embed(observations))

    def results_and_gradients(step: Callable[[], tuple[State, Info]]) -> list[Tensor]:
        end, info = step()
        parameters = list(kernel.parameters())
        loss = info.acceptance.sum() + info.proposal.square().sum()
        gradients = torch.autograd.grad(loss, parameters) if parameters else ()
        return [*end[:3], *info, *gradients]

    expected = results_and_gradients(step)
    found = results_and_gradients(torch.compile(step, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


AT_THE_END = [
    (fault, 4) for fault in ("nan", "inf", "-inf", "nan gradient", "inf gradient", "rise")
]
ON_THE_WAY = [(fault, 2) for fault in ("nan gradient", "inf gradient", "cliff")]


@torch.no_grad()
@pytest.mark.parametrize(("fault", "leapfrog"), AT_THE_END + ON_THE_WAY)
def test_a_fault_is_flagged_and_touches_no_other_chain(
    run: Run, plant: Callable[..., Energy], fault: str, leapfrog: int
) -> None:
    rows = torch.arange(40) % 3 == 0
    state, info = run.step(plant(run.energy, fault, rows, leapfrog - 1))
    healthy, healthy_info = run.step()
    assert healthy_info.accepted[rows].any()
    assert torch.equal(info.diverging, rows)
    assert torch.equal(info.acceptance[rows], torch.zeros(int(rows.sum())))
    assert not info.accepted[rows].any()
    assert torch.equal(info.proposal[rows], run.state.position[rows])
    for found, old in zip(state[:3], run.state[:3], strict=True):
        assert torch.equal(found[rows], old[rows])
    for found, wanted in zip((*state[:3], *info), (*healthy[:3], *healthy_info), strict=True):
        assert torch.equal(found[~rows], wanted[~rows])


@torch.no_grad()
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("field", ["position", "energy", "gradient"])
def test_a_start_that_is_not_finite_is_flagged_and_kept(
    run: Run, field: str, broken: float
) -> None:
    fault = getattr(run.state, field).clone()
    fault[0] = broken
    start = run.state._replace(**{field: fault})
    state, info = run._replace(state=start).step()
    assert info.diverging.tolist() == [True] + 39 * [False]
    assert info.acceptance[0] == 0
    torch.testing.assert_close(getattr(state, field)[0], fault[0], equal_nan=True)


@torch.no_grad()
def test_a_rise_of_the_energy_diverges_beyond_a_thousand_nats(run: Run) -> None:
    calm = run.step()[1].acceptance > 0.01
    assert calm.any()

    def flagged(rise: float) -> Tensor:
        _, info = run.step(lambda position: run.energy(position) + rise)
        return info.diverging[calm]

    assert not flagged(990.0).any()
    assert flagged(1010.0).all()
    assert not flagged(-1010.0).any()


@torch.no_grad()
def test_an_infinite_energy_on_the_way_is_no_failure(
    run: Run, plant: Callable[..., Energy]
) -> None:
    state, info = run.step(plant(run.energy, "inf", torch.ones(40).bool(), 1))
    expected, expected_info = run.step()
    for found, wanted in zip((*state[:3], *info), (*expected[:3], *expected_info), strict=True):
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_a_position_that_overflows_is_rejected_where_the_energy_stays_finite() -> None:
    def level(position: Tensor) -> Tensor:
        return torch.sigmoid(position).sum(dim=-1)

    kernel, position = HMC(1, step_size=1e308), torch.full((2, 1), 1.7e308)
    noise = Noise(torch.tensor([[1.0], [-1.0]]), torch.ones(2), torch.zeros(2))
    state, info = kernel.step(kernel.init(position, level), level, noise)
    assert info.diverging.tolist() == [True, False]
    assert info.acceptance.tolist() == [0.0, 1.0]
    assert torch.equal(info.proposal[0], position[0])
    assert state.position.flatten().tolist() == pytest.approx([1.7e308, 0.7e308])


@torch.no_grad()
def test_chains_never_leave_the_support(build: Build) -> None:
    def half_line(position: Tensor) -> Tensor:
        inside = (position - position.sqrt()).sum(dim=-1)  # NaN outside, as is its gradient
        return torch.where((position > 0).all(dim=-1), inside, torch.inf)

    kernel = build()
    context = kernel.embed(torch.randn(40, 4))
    state = kernel.init(torch.rand(40, 3) + 0.5, half_line)
    flagged = 0
    for step in range(20):
        noise = kernel.noise(state, seeded_generator("cpu", step))
        end, *_ = kernel.trajectory(
            state.position, noise.momentum, noise.direction, half_line, context
        )
        state, info = kernel.step(state, half_line, noise, context)
        assert torch.equal(info.diverging, ~(end > 0).all(dim=-1))
        assert (state.position > 0).all()
        assert state.energy.isfinite().all()
        flagged += int(info.diverging.sum())
    assert 0 < flagged < 800


def test_without_a_compiler_a_kernel_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samplers.kernel.compiler_works", lambda device: False)
    kernel, energy = HMC(2), standard_normal_energy
    state = kernel.init(torch.zeros(3, 2), energy)
    noise = kernel.noise(state, seeded_generator("cpu", 0))
    before, _ = kernel.step(state, energy, noise)
    with pytest.warns(UserWarning, match="run eagerly"):
        kernel.compile()
    after, _ = kernel.step(state, energy, noise)
    assert torch.equal(after.position, before.position)


def standard_normal_energy(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum(dim=-1)


class Scaled(torch.nn.Module):
    """An energy with a tensor that changes from iteration to iteration, as a temperature does."""

    def __init__(self, energy: PlainEnergy) -> None:
        super().__init__()
        self.energy, self.factor = energy, torch.ones(())

    def forward(self, position: Tensor) -> Tensor:
        return self.factor * self.energy(position)


# The compiler itself looks at the .grad of the context, and does what it warns of here.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_kernel_is_the_eager_one_and_follows_a_changed_tensor(
    build: Build, energy: PlainEnergy
) -> None:
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run here")
    torch.compiler.reset()
    kernel, scaled = build(num_leapfrogs=2), Scaled(energy)
    names = list(kernel.state_dict())
    observations, position = torch.randn(5, 4), torch.randn(5, 3)

    def results(factor: float) -> list[Tensor]:
        scaled.factor.fill_(factor)
        state = fresh_leaf(kernel.init(position, scaled))
        noise = kernel.noise(state, seeded_generator("cpu", 0))
        end, info = kernel.step(state, scaled, noise, kernel.embed(observations))
        loss = info.acceptance.sum() + info.proposal.square().sum()
        gradients = torch.autograd.grad(loss, list(kernel.parameters()) or state[:1])
        return [*end[:3], *info, *gradients]

    expected = [results(factor) for factor in (1.0, 0.5)]
    assert not torch.allclose(expected[0][0], expected[1][0])
    kernel.compile(backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        first, second = results(1.0), results(0.5)
    torch.testing.assert_close([first, second], expected, rtol=1e-9, atol=1e-9)
    assert list(kernel.state_dict()) == names


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_copies_of_a_compiled_kernel_are_not_compiled(build: Build, energy: PlainEnergy) -> None:
    compiled = []

    def backend(
        graph: torch.fx.GraphModule, inputs: list[Any], **options: Any
    ) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    kernel = build(num_leapfrogs=2)
    observations, position = torch.randn(5, 4), torch.randn(5, 3)
    kernel.compile(backend=backend)
    for other in (copy(kernel), deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        state = other.init(position, energy)
        other.step(state, energy, other.noise(state), other.embed(observations))
    assert not compiled
    state = kernel.init(position, energy)
    kernel.step(state, energy, kernel.noise(state), kernel.embed(observations))
    assert compiled


def test_a_call_has_at_least_one_step(build: Build) -> None:
    kernel = build(num_leapfrogs=2)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        kernel.compile(steps=0, backend="eager")
    assert kernel.steps_per_call == 1


@pytest.mark.parametrize("given", [{}, {"mode": "reduce-overhead"}, {"backend": "eager"}])
def test_options_of_the_compiler_do_not_meet_others(
    build: Build, given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: passed.update(options))
    monkeypatch.setattr("samplers.kernel.compiler_works", lambda device: True)
    kernel = build(num_leapfrogs=2)
    kernel.compile(**given)
    kernel.compiled(max)
    assert ("options" in passed) == (not given)
    assert given.items() <= passed.items()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@torch.no_grad()
def test_more_shapes_than_the_compilers_own_limit_are_compiled(
    build: Build, energy: PlainEnergy
) -> None:
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run here")
    torch.compiler.reset()
    kernel = build(num_leapfrogs=2)
    kernel.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for count in (4, 5):
            state = kernel.init(torch.zeros(count, 3), energy)
            kernel.step(state, energy, kernel.noise(state), kernel.embed(torch.zeros(count, 4)))


def noise(dtype: torch.dtype = torch.float64) -> Noise:
    generator = seeded_generator("cpu", 0)
    momentum = torch.randn(40, 5, generator=generator, dtype=dtype)
    direction = torch.where(torch.rand(40, generator=generator) < 0.5, -1.0, 1.0).to(dtype)
    return Noise(momentum, direction, torch.rand(40, generator=generator, dtype=dtype))


def largest(trip: RoundTrip) -> float:
    return max(float(part.abs().max()) for part in trip)


def test_round_trips_leave_rounding_errors_alone(
    random_l2hmc: Callable[..., L2HMC], energy: Energy
) -> None:
    for kernel in (HMC(3, 0.4), random_l2hmc(5)):
        assert largest(kernel.round_trip(torch.zeros(40, 5), energy, noise())) < 1e-11


def test_errors_are_those_of_the_precision(
    random_l2hmc: Callable[..., L2HMC], energy: Energy
) -> None:
    kernel = random_l2hmc(5).float()
    position = torch.zeros(40, 5, dtype=torch.float32)
    assert 1e-8 < largest(kernel.round_trip(position, energy, noise(torch.float32))) < 1e-3


class OneWay(HMC):
    """Wrong: both directions move forward, and each claims to change the volume."""

    def integrate(self, start: PhasePoint, energy: Energy, context: object = None) -> Endpoint:
        ahead = start._replace(direction=torch.ones_like(start.direction))
        end = super().integrate(ahead, energy, context)
        return end._replace(log_determinant=end.log_determinant + 0.25)


def test_a_kernel_that_does_not_come_back_is_measured(energy: Energy) -> None:
    position, kernel, draw = torch.full((40, 5), 0.1), OneWay(3, 0.2), noise()
    trip = kernel.round_trip(position, energy, draw)
    first = HMC(6, 0.2).trajectory(position, draw.momentum, torch.ones(40), energy)
    torch.testing.assert_close(trip.position, first[0] - position)
    torch.testing.assert_close(trip.momentum, first[1] - draw.momentum)
    torch.testing.assert_close(trip.log_det, torch.full((40,), 0.5))
