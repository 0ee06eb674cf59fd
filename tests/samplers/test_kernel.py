"""One property suite over every kernel: what the contract of ``Kernel`` promises."""

import io
import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from samplers import (
    HMC,
    Endpoint,
    Energy,
    EnergyWithGradient,
    Flow,
    Independence,
    Info,
    Kernel,
    Noise,
    PhasePoint,
    Preconditioned,
    State,
    Turns,
    sample,
    seeded_generator,
    value_and_gradient,
)
from samplers.energy import Counted, fresh_leaf

CHAINS = 40
OBSERVED: dict = {"observation_dim": 4, "embedding_hidden": (5,)}
Build = Callable[..., Kernel]
PlainEnergy = Callable[[Tensor], Tensor]

# Of l2hmc's builder, dimension, leapfrogs and seed; accepted 40 to 95 % here.
INSIDE: dict[str, Callable[[Build, int, int, int], Kernel]] = {
    "hmc": lambda l2hmc, dim, leaps, seed: HMC(leaps, step_size=0.6),
    "hmc with jitter": lambda l2hmc, dim, leaps, seed: HMC(leaps, step_size=0.8, jitter=0.4),
    "l2hmc": lambda l2hmc, dim, leaps, seed: l2hmc(dim, leaps, step_size=0.1, seed=seed),
    "l2hmc with context": lambda l2hmc, dim, leaps, seed: l2hmc(
        dim, leaps, step_size=0.1, seed=seed, **OBSERVED
    ),
    "independence": lambda l2hmc, dim, leaps, seed: Independence(),
}
PLAIN = ["hmc", "l2hmc", "l2hmc with context"]
WITH_CONTEXT = ["l2hmc with context", "l2hmc with context, dense", "l2hmc with context, flow"]
KERNELS = [
    *PLAIN,
    "hmc with jitter",
    *("hmc, diagonal", "l2hmc, diagonal"),
    *("hmc, dense", "independence, dense", *WITH_CONTEXT[1:]),
    *("hmc, flow", "independence, flow"),
]


def dense(dim: int) -> Tensor:
    return 0.8 * torch.eye(dim) + torch.full((dim, dim), 0.3).tril(-1)


def in_coordinates(kind: str, kernel: Kernel, dim: int, seed: int = 0) -> Kernel:
    location, factor = torch.linspace(0.4, -0.5, dim), dense(dim)
    if kind == "flow":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Flow(kernel, location, factor, num_couplings=3, hidden=8).double()
    return Preconditioned(kernel, location, factor if kind == "dense" else factor.diagonal())


@pytest.fixture
def build(request: pytest.FixtureRequest, random_l2hmc: Build) -> Build:
    """A builder of the named kernel, of any dimension and number of leapfrogs."""
    inside, _, around = request.param.partition(", ")

    def build(dim: int = 3, num_leapfrogs: int = 4, seed: int = 0) -> Kernel:
        if inside == "turns":
            learned = INSIDE["l2hmc"](random_l2hmc, dim, num_leapfrogs, seed)
            hmc = in_coordinates("dense", HMC(1, 0.5), dim)
            return Turns([in_coordinates("flow", learned, dim, seed), hmc])
        kernel = INSIDE[inside](random_l2hmc, dim, num_leapfrogs, seed)
        return in_coordinates(around, kernel, dim, seed) if around else kernel

    return build


def each_of(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("build", names, indirect=True)


class Run(NamedTuple):
    """All that goes into one step of many chains."""

    kernel: Kernel
    energy: Energy
    state: State
    noise: Noise
    context: Tensor | None

    def step(self, energy: Energy | None = None, **changes: Tensor) -> tuple[State, Info]:
        noise = self.noise._replace(**changes)
        return self.kernel.step(self.state, energy or self.energy, noise, self.context)

    def follow(self, position: Tensor, momentum: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
        return self.kernel.trajectory(position, momentum, direction, self.energy, self.context)


def begin(kernel: Kernel, energy: Energy, dim: int = 3) -> Run:
    generator = seeded_generator("cpu", 1)
    position, observations = (torch.randn(CHAINS, size, generator=generator) for size in (dim, 4))
    state = kernel.init(position, energy)
    return Run(kernel, energy, state, kernel.noise(state, generator), kernel.embed(observations))


def results(step: tuple[State, Info]) -> tuple[Tensor, ...]:
    state, info = step
    return (*state[:3], *info)


@pytest.fixture
def run(build: Build, energy: Energy) -> Run:
    return begin(build(), energy)


PATHS = [
    (name, dim, leapfrogs)
    for name in KERNELS
    for dim, leapfrogs in ((1, 3), (2, 1), (5, 3))
    if not ("flow" in name and dim == 1)
]


@torch.no_grad()
@pytest.mark.parametrize(("build", "dim", "num_leapfrogs"), PATHS, indirect=["build"])
def test_trajectories_have_an_inverse_and_the_volume_of_their_jacobian(
    build: Build, energy: Energy, dim: int, num_leapfrogs: int
) -> None:
    kernel = build(dim, num_leapfrogs)
    run = begin(kernel, energy, dim)
    direction = run.noise.direction
    # Near the mode, where no trajectory is so unstable that differences would be rough.
    start = 0.5 * run.state.position, 0.5 * run.noise.momentum
    *end, log_determinant = run.follow(*start, direction)
    assert (end[0] - start[0]).norm() > 0.1
    back = run.follow(*end, -direction)
    torch.testing.assert_close(back, (*start, -log_determinant), rtol=1e-8, atol=1e-8)

    point, columns = torch.cat(start, dim=-1), []
    for shift in 1e-5 * torch.eye(2 * dim):
        ahead, behind = (
            torch.cat(run.follow(*moved.chunk(2, dim=-1), direction)[:2], dim=-1)
            for moved in (point + shift, point - shift)
        )
        columns.append((ahead - behind) / 2e-5)
    expected = torch.stack(columns, dim=-1).det().abs().log()
    torch.testing.assert_close(log_determinant, expected, rtol=1e-5, atol=1e-6)
    moving = getattr(kernel, "kernel", kernel)
    preserves_volume = isinstance(moving, HMC | Independence) and not isinstance(kernel, Flow)
    assert (log_determinant.norm() < 1e-9) == preserves_volume


SHAPES = torch.tensor([1.0, 0.6, 2.0], dtype=torch.float64)


def log_gamma(position: Tensor) -> Tensor:
    """Logarithms of independent gamma variables: skewed, so that no error cancels."""
    return (position.exp() - SHAPES * position).sum(dim=-1)


@torch.no_grad()
@each_of([*KERNELS, "turns"])
def test_a_skewed_target_is_left_invariant(build: Build) -> None:
    kernel, count = build(num_leapfrogs=2), 40_000
    start = torch.distributions.Gamma(SHAPES, 1.0).sample(torch.Size([count])).log()
    context = kernel.embed(torch.randn(count, 4))
    chains = sample(kernel, log_gamma, start, 1, thin=2, context=context)
    end = chains.draws[:, 0]
    assert 0.1 < chains.acceptance.mean() < 0.99
    assert (end != start).any(dim=-1).double().mean() > 0.1
    features = [torch.cat([x, x**2, x**3, x * x.roll(1, dims=-1)], dim=-1) for x in (start, end)]
    change = features[1] - features[0]
    assert (change.mean(dim=0).abs() < 5 * change.std(dim=0) / count**0.5).all()


@torch.no_grad()
@each_of(KERNELS)
def test_a_step_is_that_of_metropolis_and_hastings(run: Run) -> None:
    _, energy, start, noise, _ = run
    state, info = run.step()
    position, momentum, log_determinant = run.follow(start.position, *noise[:2])
    end = value_and_gradient(energy, position)
    kinetic = 0.5 * (noise.momentum.square() - momentum.square()).sum(dim=-1)
    ratio = (start.energy - end.energy + kinetic + log_determinant).exp()
    assert (ratio < 0.9).any()
    assert (ratio > 1.1).any()
    torch.testing.assert_close(info.proposal, position)
    torch.testing.assert_close(info.acceptance, ratio.clamp(max=1.0))
    assert not info.diverging.any()

    assert torch.equal(info.accepted, noise.uniform < info.acceptance)
    assert info.accepted.any()
    assert not info.accepted.all()
    for found, new, old in zip(state[:3], end[:3], start[:3], strict=True):
        torch.testing.assert_close(found[info.accepted], new[info.accepted])
        assert torch.equal(found[~info.accepted], old[~info.accepted])
    assert not run.step(uniform=torch.ones(CHAINS))[1].accepted.any()


@torch.no_grad()
@each_of([*KERNELS, "turns"])
def test_a_step_is_a_pure_function_of_its_arguments(run: Run) -> None:
    arguments = [*run.state[:3], *run.noise, *run.kernel.state_dict().values()]
    before, random_state = [each.clone() for each in arguments], torch.get_rng_state()
    first, again = results(run.step()), results(run.step())
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, arguments, before))
    assert torch.equal(torch.get_rng_state(), random_state)


@each_of([*KERNELS, "turns"])
def test_gradients_are_one_at_the_start_and_one_for_each_leapfrog(
    build: Build, energy: Energy
) -> None:
    counted = Counted(energy)
    kernel, _, state, _, context = begin(build(), counted)
    for steps in range(3):
        assert counted.count == CHAINS * (1 + steps * kernel.num_leapfrogs)
        state, _ = kernel.step(state, counted, kernel.noise(state), context)


@torch.no_grad()
@each_of([*KERNELS, "turns"])
def test_extras_of_a_state_follow_acceptance(run: Run, with_extra: EnergyWithGradient) -> None:
    start = run.kernel.init(run.state.position, with_extra)
    state, _ = run._replace(state=start).step(with_extra)
    expected, info = run.step()
    assert info.accepted.any()
    assert not info.accepted.all()
    assert torch.equal(state.position, expected.position)
    wanted = with_extra.value_and_gradient(expected.position).extra
    torch.testing.assert_close(state.extra, wanted)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_of([*KERNELS, "turns"])
def test_steps_where_gradients_are_off(run: Run, mode: type) -> None:
    expected = results(run.step())
    with mode():
        found = results(run.step())
    assert not any(each.requires_grad for each in found)
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted.detach(), check_stride=False)


@torch.no_grad()
@each_of([*KERNELS, "turns"])
def test_shapes_and_precision_are_those_of_the_chains(build: Build, energy: Energy) -> None:
    for dtype in (torch.float32, torch.float64):
        kernel = build().to(dtype)
        state = kernel.init(torch.randn(5, 3).to(dtype), energy)
        noise, context = kernel.noise(state), kernel.embed(torch.randn(5, 4).to(dtype))
        after, info = kernel.step(state, energy, noise, context)
        for tensors in (state, after):
            assert [each.shape for each in tensors[:3]] == [(5, 3), (5,), (5, 3)]
        assert [each.shape for each in info] == [(5, 3), (5,), (5,), (5,)]
        assert info.accepted.dtype == info.diverging.dtype == torch.bool
        floating = (*noise, *after[:3], info.proposal, info.acceptance)
        assert {each.dtype for each in floating} == {dtype}


@each_of([*KERNELS, "turns"])
def test_a_saved_kernel_repeats_the_next_draw_bit_for_bit(build: Build, energy: Energy) -> None:
    kernel, restored, file = build(), build(seed=1), io.BytesIO()
    for value in restored.state_dict().values():
        value.zero_()
    torch.save(kernel.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    expected, found = (results(begin(each, energy).step()) for each in (kernel, restored))
    assert all(map(torch.equal, found, expected))


@torch.no_grad()
@each_of(["hmc", "l2hmc", "hmc, dense", "l2hmc with context, flow"])
def test_chains_may_have_step_sizes_of_their_own(run: Run) -> None:
    log_step_size = getattr(run.kernel, "kernel", run.kernel).log_step_size
    sizes = torch.linspace(0.05, 0.3, CHAINS)[:, None]
    log_step_size.data = sizes.log()
    found = results(run.step())
    for row in (0, CHAINS - 1):
        log_step_size.data = sizes[row, 0].log()
        torch.testing.assert_close([x[row] for x in found], [x[row] for x in results(run.step())])


@torch.no_grad()
@each_of(WITH_CONTEXT)
def test_observations_shape_the_proposals_of_their_chain(run: Run) -> None:
    observations = torch.randn(CHAINS, 4)
    changed = observations.clone()
    changed[0] += 1.0
    first, other = (
        run._replace(context=run.kernel.embed(each)).step()[1].proposal
        for each in (observations, changed)
    )
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[1:], other[1:])


ONE_OF_EACH_REGION = ["hmc, dense", *WITH_CONTEXT[1:], "turns"]


@each_of(ONE_OF_EACH_REGION)
def test_compiling_changes_no_draw_no_gradient_and_no_other_kernel(
    build: Build, energy: PlainEnergy, compiler: Any
) -> None:
    compiler.backend, factor = "aot_eager", torch.ones(())

    def tempered(position: Tensor) -> Tensor:
        return factor * energy(position)

    def outcomes(kernel: Kernel) -> list[Tensor]:
        found: list[Tensor] = []
        for value in (1.0, 0.5):  # a tensor inside an energy may change
            factor.fill_(value)
            run = begin(kernel, tempered)
            run = run._replace(state=fresh_leaf(run.state))
            state, info = run.step()
            loss = info.acceptance.sum() + info.proposal.square().sum()
            inputs = list(kernel.parameters()) or run.state[:1]
            gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
            found += [*results((state, info)), *gradients]
        return found

    kernel = build(num_leapfrogs=2)
    expected, moving = outcomes(kernel), copy(kernel)
    shared = zip(moving.state_dict().values(), kernel.state_dict().values(), strict=True)
    assert all(ours.is_set_to(theirs) for ours, theirs in shared)
    moving.compile(steps=3, backend=compiler)
    for eager in (kernel, copy(moving), deepcopy(moving), pickle.loads(pickle.dumps(moving))):
        torch.testing.assert_close(outcomes(eager), expected, rtol=0, atol=0)
        assert eager.steps_per_call == 1
    assert not compiler.graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(outcomes(moving), expected, rtol=1e-9, atol=1e-9)
    assert bool(compiler.graphs) != isinstance(kernel, Flow)


AT_THE_END = ["nan", "inf", "-inf", "outside", "nan gradient", "inf gradient", "rise"]
ON_THE_WAY = ["nan gradient", "inf gradient", "cliff"]
FAULTS = [
    *((name, fault, 1) for name in KERNELS for fault in AT_THE_END),
    *((name, fault, 3) for name in PLAIN for fault in ON_THE_WAY),
]


@torch.no_grad()
@pytest.mark.parametrize(("build", "fault", "leapfrogs_left"), FAULTS, indirect=["build"])
def test_a_fault_is_flagged_and_touches_no_other_chain(
    run: Run, plant: Callable[..., Energy], fault: str, leapfrogs_left: int
) -> None:
    rows = torch.arange(CHAINS) % 3 == 0
    surely = torch.where(rows, 0.0, run.noise.uniform)
    call = run.kernel.num_leapfrogs - leapfrogs_left
    state, info = run.step(plant(run.energy, fault, rows, call), uniform=surely)
    assert torch.equal(info.diverging, rows)
    assert not info.acceptance[rows].any()
    assert not info.accepted[rows].any()
    assert torch.equal(info.proposal[rows], run.state.position[rows])
    for found, old in zip(state[:3], run.state[:3], strict=True):
        assert torch.equal(found[rows], old[rows])
    healthy = run.step(uniform=surely)
    assert healthy[1].accepted[rows].any()
    for found, wanted in zip(results((state, info)), results(healthy), strict=True):
        assert torch.equal(found[~rows], wanted[~rows])


@torch.no_grad()
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("field", ["position", "energy", "gradient"])
@each_of(PLAIN)
def test_a_start_that_is_not_finite_is_flagged_and_kept(
    run: Run, field: str, broken: float
) -> None:
    fault = getattr(run.state, field).clone()
    fault[0] = broken
    state, info = run._replace(state=run.state._replace(**{field: fault})).step()
    assert info.diverging.tolist() == [True] + (CHAINS - 1) * [False]
    assert info.acceptance[0] == 0
    torch.testing.assert_close(getattr(state, field)[0], fault[0], equal_nan=True)


@torch.no_grad()
@each_of(PLAIN)
def test_only_a_rise_of_the_energy_beyond_a_thousand_nats_diverges(
    run: Run, plant: Callable[..., Energy]
) -> None:
    calm = run.step()[1].acceptance > 0.01
    for rise, diverges in ((990.0, False), (1010.0, True), (-1010.0, False)):
        _, info = run.step(lambda position, rise=rise: run.energy(position) + rise)
        assert (info.diverging[calm] == diverges).all()
    on_the_way = plant(run.energy, "inf", torch.ones(CHAINS).bool(), 1)
    assert all(map(torch.equal, results(run.step(on_the_way)), results(run.step())))


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


def test_without_a_compiler_a_kernel_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, energy: Energy
) -> None:
    monkeypatch.setattr("samplers.kernel.compiler_works", lambda device: False)
    kernel = HMC(2)
    before = results(begin(kernel, energy).step())
    with pytest.warns(UserWarning, match="run eagerly"):
        kernel.compile()
    assert all(map(torch.equal, results(begin(kernel, energy).step()), before))


def test_a_call_has_at_least_one_step() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        HMC().compile(steps=0, backend="eager")


@pytest.mark.parametrize("given", [{}, {"mode": "reduce-overhead"}, {"backend": "eager"}])
def test_options_of_the_compiler_do_not_meet_others(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: passed.update(options))
    monkeypatch.setattr("samplers.kernel.compiler_works", lambda device: True)
    kernel = HMC(2)
    kernel.compile(**given)
    kernel.compiled(max)
    assert ("options" in passed) == (not given)
    assert given.items() <= passed.items()


@torch.no_grad()
def test_more_shapes_than_the_compilers_own_limit_are_compiled(
    energy: Energy, compiler: Any
) -> None:
    kernel = HMC(2)
    kernel.compile(backend=compiler)
    with torch._dynamo.config.patch(recompile_limit=1):
        for count in (4, 5):
            state = kernel.init(torch.zeros(count, 3), energy)
            kernel.step(state, energy, kernel.noise(state))


class OneWay(HMC):
    """Wrong: both directions move forward, and each claims to change the volume."""

    def integrate(self, start: PhasePoint, energy: Energy, context: object = None) -> Endpoint:
        ahead = start._replace(direction=torch.ones_like(start.direction))
        end = super().integrate(ahead, energy, context)
        return end._replace(log_determinant=end.log_determinant + 0.25)


def test_a_kernel_that_does_not_come_back_is_measured(energy: Energy) -> None:
    kernel, _, (position, *_), noise, _ = begin(OneWay(3, 0.2), energy)
    trip = kernel.round_trip(position, energy, noise)
    end, momentum, _ = HMC(6, 0.2).trajectory(position, noise.momentum, torch.ones(CHAINS), energy)
    torch.testing.assert_close(trip.position, end - position)
    torch.testing.assert_close(trip.momentum, momentum - noise.momentum)
    torch.testing.assert_close(trip.log_det, torch.full((CHAINS,), 0.5))
