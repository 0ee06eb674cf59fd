import io
import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import (
    HMC,
    L2HMC,
    Energy,
    GaussianTarget,
    Kernel,
    Noise,
    Preconditioned,
    State,
    sample,
    seeded_generator,
)

LOCATION = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64)
DENSE = torch.tensor([[0.8, 0.0, 0.0], [0.5, 1.2, 0.0], [-0.3, 0.4, 0.6]], dtype=torch.float64)
FACTORS = {"diagonal": DENSE.diagonal(), "dense": DENSE}
Build = Callable[..., L2HMC]


@pytest.fixture(params=["diagonal", "dense"])
def factor(request: pytest.FixtureRequest) -> Tensor:
    return FACTORS[request.param]


@pytest.fixture(params=["hmc", "l2hmc"])
def kernel(request: pytest.FixtureRequest, random_l2hmc: Build, factor: Tensor) -> Preconditioned:
    inside: Kernel = (
        HMC(3, step_size=0.6) if request.param == "hmc" else random_l2hmc(3, step_size=0.1)
    )
    return Preconditioned(inside, LOCATION, factor)


def start(kernel: Kernel, energy: Energy, count: int) -> tuple[State, Noise]:
    state = kernel.init(torch.randn(count, 3), energy)
    return state, kernel.noise(state, seeded_generator("cpu", 1))


@torch.no_grad()
def test_opposite_direction_undoes_the_trajectory(kernel: Preconditioned, energy: Energy) -> None:
    position, momentum = torch.randn(2, 6, 3).unbind()
    direction = torch.tensor([1.0, -1.0]).repeat(3)
    *end, log_determinant = kernel.trajectory(position, momentum, direction, energy)
    assert (end[0] - position).norm() > 0.1
    back = kernel.trajectory(*end, -direction, energy)
    torch.testing.assert_close(back, (position, momentum, -log_determinant), rtol=1e-9, atol=1e-9)


def test_log_determinant_is_that_of_the_brute_force_jacobian(
    kernel: Preconditioned, energy: Energy
) -> None:
    direction = torch.tensor([1.0, -1.0])
    begin = torch.randn(2, 6)

    def joint(begin: Tensor) -> Tensor:
        position, momentum = begin.chunk(2, dim=-1)
        return torch.cat(kernel.trajectory(position, momentum, direction, energy)[:2], dim=-1)

    jacobian = torch.autograd.functional.jacobian(joint, begin)
    sign, expected = torch.stack([jacobian[row, :, row] for row in range(2)]).slogdet()
    found = kernel.trajectory(*begin.chunk(2, dim=-1), direction, energy)[2]
    assert torch.equal(sign, torch.ones(2))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found.norm() > 1e-2) == isinstance(kernel.kernel, L2HMC)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hmc", "l2hmc"])
def test_gaussian_in_its_own_coordinates_is_the_standard_normal(
    kind: str, random_l2hmc: Build
) -> None:
    inside: Kernel = HMC(4, step_size=0.9) if kind == "hmc" else random_l2hmc(3)
    kernel, target = (
        Preconditioned(inside, LOCATION, DENSE),
        GaussianTarget(LOCATION, DENSE @ DENSE.T),
    )

    def standard_normal(position: Tensor) -> Tensor:
        return 0.5 * position.square().sum(dim=-1)

    white = inside.init(torch.randn(8, 3), standard_normal)
    state = kernel.init(LOCATION + white.position @ DENSE.T, target)
    generator = seeded_generator("cpu", 0)
    rejected = 0
    for _ in range(5):
        noise = kernel.noise(state, generator)
        white, white_info = inside.step(white, standard_normal, noise)
        state, info = kernel.step(state, target, noise)
        torch.testing.assert_close(state.position, LOCATION + white.position @ DENSE.T)
        torch.testing.assert_close(state.energy, white.energy)
        torch.testing.assert_close(info.acceptance, white_info.acceptance)
        rejected += int((~info.accepted).sum())
    assert 0 < rejected < 40


@torch.no_grad()
def test_state_stays_that_of_the_energy_in_x(kernel: Preconditioned, energy: Energy) -> None:
    state, noise = start(kernel, energy, 20)
    after, info = kernel.step(state, energy, noise)
    assert info.accepted.any()
    assert not info.accepted.all()
    expected = kernel.init(after.position, energy)
    torch.testing.assert_close(after[:3], expected[:3])
    assert torch.equal(after.position[~info.accepted], state.position[~info.accepted])


@torch.no_grad()
def test_skewed_target_is_left_invariant(kernel: Preconditioned, energy: Energy) -> None:
    """Independent chains from exact draws on a grid, where sums are integrals to rounding."""
    assert callable(energy)
    axis = torch.linspace(-9, 4, 131)
    grid = torch.cartesian_prod(axis, axis, axis)
    weight = (-energy(grid)).softmax(dim=0)
    chosen = weight.multinomial(10_000, replacement=True, generator=seeded_generator("cpu", 2))
    begin = grid[chosen]
    chains = sample(kernel, energy, begin, 1, thin=5)
    end = chains.draws[:, 0]
    assert 0.2 < chains.acceptance.mean() < 0.99
    assert ((end - begin).norm(dim=-1) > 0).double().mean() > 0.8
    for power in (1, 2, 3):
        expected = weight @ grid**power
        for values in (end**power - expected, end**power - begin**power):
            error = values.std(dim=0) / len(values) ** 0.5
            assert (values.mean(dim=0).abs() < 5 * error).all()


@torch.no_grad()
def test_saved_kernel_repeats_the_next_draw_bit_for_bit(
    random_l2hmc: Build, energy: Energy, factor: Tensor
) -> None:
    kernel = Preconditioned(random_l2hmc(3, seed=0), LOCATION, factor)
    other = Preconditioned(random_l2hmc(3, seed=1), torch.zeros(3), 2 * factor)
    file = io.BytesIO()
    torch.save(kernel.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    state, noise = start(kernel, energy, 6)
    expected, _ = kernel.step(state, energy, noise)
    found, _ = other.step(state, energy, noise)
    assert all(map(torch.equal, found[:3], expected[:3]))


def test_another_kernel_in_the_same_coordinates(factor: Tensor) -> None:
    first = Preconditioned(HMC(2), LOCATION, factor)
    inside = HMC(7, step_size=0.2)
    second = first.with_kernel(inside)
    assert second.kernel is inside
    assert second.num_leapfrogs == 7
    assert second.log_step_size is inside.log_step_size
    assert torch.equal(second.location, LOCATION)
    assert torch.equal(second.factor, factor)


def test_context_is_that_of_the_kernel_inside(random_l2hmc: Build, energy: Energy) -> None:
    inside = random_l2hmc(3, observation_dim=4, embedding_hidden=(5,))
    kernel, observations = Preconditioned(inside, LOCATION, DENSE), torch.randn(6, 4)
    context = kernel.embed(observations)
    assert context is not None
    assert torch.equal(context, inside.embed(observations))
    state, noise = start(kernel, energy, 6)
    _, info = kernel.step(state, energy, noise, context)
    _, other_info = kernel.step(state, energy, noise, torch.zeros_like(context))
    assert not torch.allclose(info.proposal, other_info.proposal)


# The compiler itself looks at the .grad of the state, and does what it warns of here.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_kernel_is_the_eager_one(random_l2hmc: Build, energy: Energy) -> None:
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run here")
    kernel = Preconditioned(random_l2hmc(3, num_leapfrogs=1), LOCATION, DENSE)
    state, noise = start(kernel, energy, 6)

    def results() -> list[Tensor]:
        after, info = kernel.step(state, energy, noise)
        loss = info.proposal.square().sum() + info.acceptance.sum()
        gradients = torch.autograd.grad(loss, list(kernel.parameters()))
        return [*after[:3], *info, *gradients]

    expected = results()
    kernel.compile(backend="aot_eager")
    torch.testing.assert_close(results(), expected, rtol=1e-9, atol=1e-9)


class Graphs(list[torch.fx.GraphModule]):
    """A backend that keeps what it is to compile, and leaves it as it is."""

    def __call__(
        self, graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any
    ) -> torch.fx.GraphModule:
        self.append(graph)
        return graph


def compiled_graphs(inside: Kernel, factor: Tensor, energy: Energy) -> Graphs:
    """Return what two steps of a kernel in whitened coordinates have compiled."""
    torch.compiler.reset()
    kernel, graphs = Preconditioned(inside, LOCATION, factor), Graphs()
    kernel = Preconditioned(kernel, LOCATION, factor)  # as a second warm-up does
    kernel.compile(backend=graphs)
    state, noise = start(kernel, energy, 6)
    for _ in range(2):
        state, _ = kernel.step(state, energy, noise)
    return graphs


@torch.no_grad()
def test_all_leapfrogs_of_l2hmc_share_one_compilation(
    random_l2hmc: Build, energy: Energy, factor: Tensor
) -> None:
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run here")
    (short,) = compiled_graphs(random_l2hmc(3, 1), factor, energy)
    (long,) = compiled_graphs(random_l2hmc(3, 3), factor, energy)
    assert len(long.graph.nodes) == len(short.graph.nodes)


@torch.no_grad()
def test_steps_of_hmc_are_one_region_and_share_one_compilation(
    energy: Energy, factor: Tensor
) -> None:
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run here")
    (graph,) = compiled_graphs(HMC(2), factor, energy)
    outputs = graph.graph.output_node().args[0]
    assert isinstance(outputs, tuple)
    assert len(outputs) == 7  # state and info


@torch.no_grad()
def test_a_copy_shares_the_parameters_and_is_compiled_alone(
    random_l2hmc: Build, energy: Energy
) -> None:
    kernel, graphs = Preconditioned(random_l2hmc(3, 2), LOCATION, DENSE), Graphs()
    state, noise = start(kernel, energy, 6)
    shared = copy(kernel)
    assert all(map(Tensor.is_set_to, shared.state_dict().values(), kernel.state_dict().values()))
    shared.compile(backend=graphs)
    for eager in (kernel, copy(shared), deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        eager.step(state, energy, noise)
    assert not graphs
    shared.step(state, energy, noise)
    assert graphs


UNUSABLE = {
    "too short": torch.ones(2),
    "too small": torch.eye(2),
    "not square": torch.ones(3, 2),
    "a batch": torch.eye(3)[None],
}


@pytest.mark.parametrize("shape", UNUSABLE)
def test_factor_of_another_shape_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match=r"the factor must have shape \(3,\) or \(3, 3\), got"):
        Preconditioned(HMC(), LOCATION, UNUSABLE[shape])


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan])
def test_factor_without_a_positive_diagonal_is_refused(factor: Tensor, value: float) -> None:
    broken = factor.clone()
    broken.view(-1)[-1] = value
    with pytest.raises(ValueError, match="diagonal of the factor must be positive"):
        Preconditioned(HMC(), LOCATION, broken)


def test_factor_that_is_not_lower_triangular_is_refused() -> None:
    with pytest.raises(ValueError, match="the factor must be lower triangular"):
        Preconditioned(HMC(), LOCATION, DENSE @ DENSE.T)
