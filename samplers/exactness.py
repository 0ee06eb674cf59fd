"""How exact a kernel is in the arithmetic that it runs in."""

from typing import NamedTuple

import torch
from torch import Tensor

from samplers.energy import Energy
from samplers.kernel import Context, Kernel, Noise


class RoundTrip(NamedTuple):
    """What a trajectory and its way back leave, of which exact arithmetic would leave nothing."""

    position: Tensor
    """Where the way back ends minus where the trajectory began, (B, D)."""
    momentum: Tensor
    """The same of the momentum, (B, D)."""
    log_det: Tensor
    """Sum of the log-determinants of both ways, (B,) nats."""


@torch.no_grad()
def round_trip(
    kernel: Kernel, position: Tensor, energy: Energy, noise: Noise, context: Context = None
) -> RoundTrip:
    """Follow a trajectory and then, in the opposite direction, its way back.

    Detailed balance rests on both being inverse; a learned kernel whose scales have grown large can
    lose that to rounding.

    Arguments:
        kernel: HMC, L2HMC or another kernel.
        position: Where the chains are, (B, D).
        energy: U, from (B, D) to (B,).
        noise: As drawn by ``kernel.noise``.
        context: As returned by ``kernel.embed``, where it returns one.
    """
    direction = noise.direction
    end, momentum, log_det = kernel.trajectory(position, noise.momentum, direction, energy, context)
    back, momentum_back, log_det_back = kernel.trajectory(
        end, momentum, -direction, energy, context
    )
    return RoundTrip(back - position, momentum_back - noise.momentum, log_det + log_det_back)
