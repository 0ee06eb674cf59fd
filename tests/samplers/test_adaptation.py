import math

import pytest
import torch
from torch import Tensor

from samplers import HMC, sample, seeded_generator, track_acceptance
from samplers.adaptation import TARGET_ACCEPTANCE


def gaussian(position: Tensor) -> Tensor:
    """Ten standard deviations, so that no trajectory returns all coordinates at once."""
    return 0.5 * (position / torch.linspace(0.5, 1.5, 10)).square().sum(dim=-1)


def test_one_update_by_hand() -> None:
    kernel = HMC(step_size=0.1)
    track_acceptance(kernel, torch.tensor([0.9, 1.0, 0.5]), target=0.6, gain=0.5)
    torch.testing.assert_close(kernel.log_step_size, torch.tensor(math.log(0.1) + 0.5 * 0.2))


@pytest.mark.parametrize(("acceptance", "sign"), [(0.9, 1), (0.65, 0), (0.1, -1)])
def test_step_size_grows_with_too_high_an_acceptance_only(acceptance: float, sign: int) -> None:
    kernel = HMC(step_size=0.1)
    before = kernel.log_step_size.clone()
    track_acceptance(kernel, torch.full((5, 2), acceptance))
    change = kernel.log_step_size - before
    assert torch.equal(
        torch.where(change.abs() < 1e-15, 0.0, change.sign()), torch.tensor(sign * 1.0)
    )


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_non_finite_acceptance_counts_zero(broken: float) -> None:
    kernel, other = HMC(), HMC()
    track_acceptance(kernel, torch.tensor([0.8, broken]))
    track_acceptance(other, torch.tensor([0.8, 0.0]))
    assert torch.equal(kernel.log_step_size, other.log_step_size)


def test_buffer_keeps_its_identity_and_type() -> None:
    kernel = HMC().float()
    buffer = kernel.log_step_size
    track_acceptance(kernel, torch.tensor([0.9], requires_grad=True))
    assert kernel.log_step_size is buffer
    assert buffer.dtype == torch.float32
    assert not buffer.requires_grad


@pytest.mark.parametrize("step_size", [0.1, 2.0])
def test_acceptance_settles_at_the_target(step_size: float) -> None:
    kernel = HMC(num_leapfrogs=3, step_size=step_size)
    generator = seeded_generator("cpu", 0)
    state = kernel.init(torch.randn(500, 10), gaussian)
    for _ in range(300):
        state, info = kernel.step(state, gaussian, kernel.noise(state, generator))
        track_acceptance(kernel, info.acceptance)
    settled = sample(kernel, gaussian, state.position, 50, generator=generator).acceptance
    # Five standard deviations over seeds: 0.002 from these draws, the rest from the last updates.
    assert abs(settled.mean() - TARGET_ACCEPTANCE) < 5 * 0.004
