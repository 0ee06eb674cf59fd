"""What only HMC does; what every kernel does is in test_kernel."""

import math
import pickle
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import HMC, L2HMC, Kernel, Noise, State, seeded_generator, value_and_gradient
from samplers.preconditioned import Preconditioned

START = torch.tensor([[0.1, -0.2, 0.3], [0.3, 0.1, -0.1]], dtype=torch.float64)
MOMENTUM = torch.tensor([[0.2, 0.1, -0.3], [-0.1, 0.3, 0.2]], dtype=torch.float64)
DIRECTION = torch.tensor([1.0, -1.0], dtype=torch.float64)


def coupled(position: Tensor) -> Tensor:
    """The Hénon-Heiles system with a third, free coordinate."""
    x, y, z = position.unbind(dim=-1)
    return 0.5 * (x**2 + y**2 + z**2) + x**2 * y - y**3 / 3


def quadratic(position: Tensor) -> Tensor:
    return 0.5 * position.square().sum(dim=-1)


@pytest.mark.parametrize("count", [1, 3])
def test_trajectory_by_hand(count: int) -> None:
    position, momentum, step_size = START, MOMENTUM, DIRECTION[:, None] * 0.3
    for _ in range(count):
        half = momentum - step_size / 2 * value_and_gradient(coupled, position).gradient
        position = position + step_size * half
        momentum = half - step_size / 2 * value_and_gradient(coupled, position).gradient
    found = HMC(count, 0.3).trajectory(START, MOMENTUM, DIRECTION, coupled)
    torch.testing.assert_close(found, (position, momentum, torch.zeros(2)))


@torch.no_grad()
def test_long_trajectories_are_compiled_in_pieces_that_they_share(
    energy: Callable, compiler: Any
) -> None:
    def steps(kernel: HMC, chains: int) -> object:
        state = kernel.init(torch.ones(chains, 2), energy)
        noise = kernel.noise(state, seeded_generator("cpu", 0))
        after, _ = kernel.step(state, energy, noise)
        return kernel.step(after, energy, noise)

    for count, compiled in ((20, 1), (30, 2), (34, 3)):
        kernel = HMC(count, step_size=0.05)
        expected = steps(kernel, 5)
        kernel.compile(backend=compiler)
        torch.testing.assert_close(steps(kernel, 5), expected, rtol=1e-9, atol=1e-9)
        for other in (copy(kernel), pickle.loads(pickle.dumps(kernel))):
            steps(other, 3)
        assert len(compiler.graphs) == compiled, count
    # Twenty in one region, ten, four.
    lengths = [len(graph.graph.nodes) for graph in compiler.graphs]
    assert lengths[0] > lengths[1] > lengths[2]


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        *(("num_leapfrogs", value, "at least 1") for value in (0, -3)),
        *(("step_size", value, "a positive number") for value in (0.0, -0.1, math.nan, math.inf)),
        *(("jitter", value, "at least 0 and below 1") for value in (-0.1, 1.0, math.nan)),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float, needed: str) -> None:
    for build in (HMC, partial(L2HMC, 2)) if name != "jitter" else (HMC,):
        with pytest.raises(ValueError, match=f"^{name} must be {needed}, got {value}$"):
            build(**{name: value})


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [False, True])
def test_jitter_shortens_each_step_by_a_share_of_its_own(wrapped: bool) -> None:
    kernel: Kernel = HMC(5, 0.3, jitter=0.4)
    if wrapped:
        kernel = Preconditioned(kernel, torch.zeros(2), torch.ones(2))
    generator = seeded_generator("cpu", 0)
    state = kernel.init(torch.randn(4000, 2, generator=generator), quadratic)
    noise = kernel.noise(state, generator)
    shares = noise.direction.abs()
    # Uniform: a tenth of 4,000 is 400 with a standard deviation of 19.
    assert ((shares.histc(10, 0.6, 1.0) - 400).abs() < 5 * 19).all()
    assert abs(float((noise.direction > 0).float().mean()) - 0.5) < 5 * 0.5 / 4000**0.5
    _, info = kernel.step(state, quadratic, noise)
    first = Noise(*(part[:1] for part in noise))._replace(direction=noise.direction[:1].sign())
    alone = State(*(part[:1] for part in state[:3]))
    _, expected = HMC(5, 0.3 * float(shares[0])).step(alone, quadratic, first)
    torch.testing.assert_close(info.proposal[:1], expected.proposal)


@torch.no_grad()
def test_a_trajectory_as_long_as_a_period_moves_with_jitter_alone() -> None:
    def correlation(jitter: float) -> float:
        kernel, generator = HMC(5, 2 * math.sin(math.pi / 5), jitter), seeded_generator("cpu", 0)
        start = torch.randn(2000, 1, generator=generator)
        state = kernel.init(start, quadratic)
        end, _ = kernel.step(state, quadratic, kernel.noise(state, generator))
        return float(torch.cat([start, end.position], dim=1).T.corrcoef()[0, 1])

    assert correlation(0.0) > 0.999
    assert correlation(0.5) < 0.6
