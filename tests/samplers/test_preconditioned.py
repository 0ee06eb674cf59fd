"""What only kernels in other coordinates do; what every kernel does is in test_kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import HMC, Energy, Flow, GaussianTarget, Kernel, Preconditioned, seeded_generator

LOCATION = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64)
DENSE = torch.tensor([[0.8, 0.0, 0.0], [0.5, 1.2, 0.0], [-0.3, 0.4, 0.6]], dtype=torch.float64)
Build = Callable[..., Kernel]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hmc", "l2hmc"])
def test_gaussian_in_its_own_coordinates_is_the_standard_normal(
    kind: str, random_l2hmc: Build
) -> None:
    inside = HMC(4, step_size=0.9) if kind == "hmc" else random_l2hmc(3)
    kernel = Preconditioned(inside, LOCATION, DENSE)
    target = GaussianTarget(LOCATION, DENSE @ DENSE.T)

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


@pytest.mark.parametrize("kind", [Preconditioned, Flow])
def test_another_kernel_in_the_same_coordinates(kind: type[Preconditioned | Flow]) -> None:
    first, inside = kind(HMC(2), LOCATION, DENSE), HMC(7, step_size=0.2)
    second = first.with_kernel(inside)
    assert second.kernel is inside
    assert second.num_leapfrogs == 7
    assert second.log_step_size is inside.log_step_size
    x = torch.randn(5, 3)
    there, again = (each.coordinates(torch.zeros_like).into(x) for each in (first, second))
    assert torch.equal(there, again)


@torch.no_grad()
def test_all_leapfrogs_of_l2hmc_share_one_compilation(
    random_l2hmc: Build, energy: Energy, compiler: Any
) -> None:
    for num_leapfrogs in (1, 3):
        kernel = Preconditioned(random_l2hmc(3, num_leapfrogs), LOCATION, DENSE)
        kernel = Preconditioned(kernel, LOCATION, DENSE)  # as a second warm-up does
        kernel.compile(backend=compiler)
        state = kernel.init(torch.randn(6, 3), energy)
        for _ in range(2):
            state, _ = kernel.step(state, energy, kernel.noise(state))
    assert len(compiler.graphs) == 1  # of a leapfrog, whatever their number


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        *(
            (factor, r"must have shape \(3,\) or \(3, 3\), got")
            for factor in (torch.ones(2), torch.eye(2), torch.ones(3, 2), torch.eye(3)[None])
        ),
        *(
            (factor, "diagonal of the factor must be positive")
            for value in (0.0, -1.0, torch.nan)
            for factor in (torch.tensor([1.0, 1.0, value]), torch.tensor([1.0, 1.0, value]).diag())
        ),
        (torch.ones(3, 3), "the factor must be lower triangular"),
    ],
)
def test_factors_that_cannot_be_are_refused(factor: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preconditioned(HMC(), LOCATION, factor)
