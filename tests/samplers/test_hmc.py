import math
import pickle
from collections.abc import Callable
from copy import copy

import pytest
import torch
from torch import Tensor

from samplers import HMC, seeded_generator


def oscillator(position: Tensor) -> Tensor:
    """Springs of frequency 1, 2 and 3."""
    return 0.5 * (torch.tensor([1.0, 4.0, 9.0]) * position.square()).sum(dim=-1)


def pendulum(position: Tensor) -> Tensor:
    return -position.cos().sum(dim=-1)


def quartic(position: Tensor) -> Tensor:
    return 0.25 * position.pow(4).sum(dim=-1)


def coupled(position: Tensor) -> Tensor:
    """The Hénon-Heiles system with a third, free coordinate."""
    x, y, z = position.unbind(dim=-1)
    return 0.5 * (x**2 + y**2 + z**2) + x**2 * y - y**3 / 3


def kinetic_energy(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.square().sum(dim=-1)


SYSTEMS = [oscillator, pendulum, quartic, coupled]
START = torch.tensor([[0.1, -0.2, 0.3], [0.3, 0.1, -0.1]], dtype=torch.float64)
MOMENTUM = torch.tensor([[0.2, 0.1, -0.3], [-0.1, 0.3, 0.2]], dtype=torch.float64)
DIRECTION = torch.tensor([1.0, -1.0], dtype=torch.float64)
DURATION = 2.0


def halved_steps(error: Callable[[HMC], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the error over the same duration at a small step size, and at half of it."""
    coarse, fine = (HMC(leaps, DURATION / leaps) for leaps in (64, 128))
    return error(coarse), error(fine)


def analytic_oscillation() -> tuple[Tensor, Tensor]:
    frequency = torch.tensor([1.0, 2.0, 3.0])
    angle = frequency * DURATION * DIRECTION[:, None]
    position = START * angle.cos() + MOMENTUM / frequency * angle.sin()
    return position, MOMENTUM * angle.cos() - START * frequency * angle.sin()


def test_follows_the_analytic_oscillation_with_an_error_of_second_order() -> None:
    def error(kernel: HMC) -> Tensor:
        found = kernel.trajectory(START, MOMENTUM, DIRECTION, oscillator)[:2]
        return (torch.cat(found, -1) - torch.cat(analytic_oscillation(), -1)).norm(dim=-1)

    coarse, fine = halved_steps(error)
    assert (coarse < 1e-2).all()
    # The next term of the error is of fourth order, (3ε)² ≈ 1 % of this one.
    torch.testing.assert_close(coarse / fine, torch.full((2,), 4.0), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("system", SYSTEMS)
def test_conserves_energy_up_to_an_error_of_second_order(system: Callable) -> None:
    def error(kernel: HMC) -> Tensor:
        position, momentum, _ = kernel.trajectory(START, MOMENTUM, DIRECTION, system)
        before = system(START) + kinetic_energy(MOMENTUM)
        return (system(position) + kinetic_energy(momentum) - before).abs()

    coarse, fine = halved_steps(error)
    assert (coarse > 1e-8).all()
    assert (coarse < 1e-3).all()
    torch.testing.assert_close(coarse / fine, torch.full((2,), 4.0), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("system", SYSTEMS)
def test_conserves_energy_for_many_periods(system: Callable) -> None:
    position, momentum, _ = HMC(2000, 0.1).trajectory(START, MOMENTUM, DIRECTION, system)
    before = system(START) + kinetic_energy(MOMENTUM)
    # Symplectic: the error oscillates at O(ε²) and does not grow with the time.
    assert (
        (system(position) + kinetic_energy(momentum) - before).abs() < 0.03 * before.abs()
    ).all()


def test_is_unstable_beyond_twice_the_smallest_scale() -> None:
    def energy_after(step_size: float) -> Tensor:
        position, *_ = HMC(100, step_size).trajectory(START, MOMENTUM, DIRECTION, oscillator)
        return oscillator(position)

    assert (energy_after(0.99 * 2 / 3) < 100.0).all()
    assert (energy_after(1.05 * 2 / 3) > 1e6).all()


def test_preserves_volume_exactly() -> None:
    _, _, log_determinant = HMC(5, 0.1).trajectory(START, MOMENTUM, DIRECTION, coupled)
    assert torch.equal(log_determinant, torch.zeros(2))


def test_step_size_is_a_buffer_that_travels_with_the_kernel() -> None:
    kernel = HMC(num_leapfrogs=5, step_size=0.3)
    assert not list(kernel.parameters())
    assert kernel.log_step_size.shape == ()
    assert kernel.step_size.item() == pytest.approx(0.3, rel=1e-12)
    other = HMC(num_leapfrogs=5, step_size=7.0)
    other.load_state_dict(kernel.state_dict())
    assert torch.equal(other.step_size, kernel.step_size)


def test_has_nothing_to_embed() -> None:
    assert HMC().embed(torch.randn(4, 3)) is None


def test_chains_of_double_precision_run_with_a_kernel_of_single_precision() -> None:
    position, momentum, _ = HMC(3, 0.1).float().trajectory(START, MOMENTUM, DIRECTION, oscillator)
    assert position.dtype == momentum.dtype == torch.float64


@torch.no_grad()
def test_long_trajectories_are_compiled_in_pieces_that_they_share(energy: Callable) -> None:
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run here")
    torch.compiler.reset()
    lengths = []

    def backend(
        graph: torch.fx.GraphModule, inputs: list[Tensor], **options: object
    ) -> torch.fx.GraphModule:
        lengths.append(len(graph.graph.nodes))
        return graph

    def steps(kernel: HMC, chains: int) -> object:
        state = kernel.init(torch.ones(chains, 2), energy)
        noise = kernel.noise(state, seeded_generator("cpu", 0))
        after, _ = kernel.step(state, energy, noise)
        return kernel.step(after, energy, noise)

    for count, compiled in ((20, 1), (30, 2), (100, 2), (34, 3)):
        kernel = HMC(count, step_size=0.05)
        expected = steps(kernel, 5)
        kernel.compile(backend=backend)
        torch.testing.assert_close(steps(kernel, 5), expected, rtol=1e-9, atol=1e-9)
        for other in (copy(kernel), pickle.loads(pickle.dumps(kernel))):
            steps(other, 3)
        assert len(lengths) == compiled, count
    # Twenty in one region, ten, four.
    assert lengths[0] > lengths[1] > lengths[2]


@pytest.mark.parametrize("num_leapfrogs", [0, -3])
def test_too_few_leapfrogs_are_refused(num_leapfrogs: int) -> None:
    with pytest.raises(ValueError, match=f"num_leapfrogs must be at least 1, got {num_leapfrogs}"):
        HMC(num_leapfrogs=num_leapfrogs)


@pytest.mark.parametrize("step_size", [0.0, -0.1, math.nan, math.inf])
def test_step_size_that_is_no_positive_number_is_refused(step_size: float) -> None:
    with pytest.raises(ValueError, match=f"step_size must be a positive number, got {step_size}"):
        HMC(step_size=step_size)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_chains_may_have_step_sizes_of_their_own(energy: Callable, compiled: bool) -> None:
    if compiled and not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run here")
    sizes, kernel = torch.tensor([[0.1], [0.7], [0.3]]), HMC(3)
    kernel.log_step_size = sizes.log()
    if compiled:
        kernel.compile(backend="eager")
    state = kernel.init(torch.randn(3, 2), energy)
    noise = kernel.noise(state)
    _, info = kernel.step(state, energy, noise)
    for row, size in enumerate(sizes.flatten().tolist()):
        _, alone = HMC(3, size).step(state, energy, noise)
        torch.testing.assert_close(info.proposal[row], alone.proposal[row])
        torch.testing.assert_close(info.acceptance[row], alone.acceptance[row])
