from collections.abc import Callable

import torch
from torch import Tensor

from samplers import HMC, L2HMC, Noise, RoundTrip, round_trip, seeded_generator

Energy = Callable[[Tensor], Tensor]


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
        assert largest(round_trip(kernel, torch.zeros(40, 5), energy, noise())) < 1e-11


def test_errors_are_those_of_the_precision(
    random_l2hmc: Callable[..., L2HMC], energy: Energy
) -> None:
    kernel = random_l2hmc(5).float()
    position = torch.zeros(40, 5, dtype=torch.float32)
    assert 1e-8 < largest(round_trip(kernel, position, energy, noise(torch.float32))) < 1e-3


class OneWay(HMC):
    """Wrong: both directions move forward, and each claims to change the volume."""

    def integrate(self, state, momentum, direction, energy, context=None):  # type: ignore  # noqa: ANN001, ANN201
        end, momentum, log_det = super().integrate(
            state, momentum, torch.ones_like(direction), energy, context
        )
        return end, momentum, log_det + 0.25


def test_a_kernel_that_does_not_come_back_is_measured(energy: Energy) -> None:
    position, kernel, draw = torch.full((40, 5), 0.1), OneWay(3, 0.2), noise()
    trip = round_trip(kernel, position, energy, draw)
    first = HMC(6, 0.2).trajectory(position, draw.momentum, torch.ones(40), energy)
    torch.testing.assert_close(trip.position, first[0] - position)
    torch.testing.assert_close(trip.momentum, first[1] - draw.momentum)
    torch.testing.assert_close(trip.log_det, torch.full((40,), 0.5))
