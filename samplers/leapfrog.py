"""The leapfrog integrator, plain and augmented; one code path serves both directions in time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.energy import Energy, State, value_and_gradient


class Update(NamedTuple):
    """S, T and Q at one point of the trajectory, each (B, D)."""

    scale: Tensor
    """S: log-scale of the variable that is updated, per unit of step size."""
    translation: Tensor
    """T: added to the gradient or to the velocity."""
    gate: Tensor
    """Q: log-scale of the gradient or of the momentum, per unit of step size."""


def leapfrogs(
    state: State, momentum: Tensor, energy: Energy, step_size: Tensor, count: int
) -> tuple[State, Tensor]:
    r"""Take leapfrogs of Hamiltonian dynamics.

    .. math:: v' = v - \tfrac{ε}{2} ∂U(x), \quad x' = x + ε v', \quad
        v'' = v' - \tfrac{ε}{2} ∂U(x')

    The half kick that ends a leapfrog and the one that begins the next are one.

    Arguments:
        state: Position, energy and gradient of the chains; the gradient is not evaluated again.
        momentum: v, (B, D).
        energy: U, from (B, D) to (B,).
        step_size: ε, 0-d or (B, 1); negative for a chain that goes backward in time.
        count: M, at least 1.
    """
    backward = -step_size
    momentum = torch.addcmul(momentum, backward, state.gradient, value=0.5)
    for remaining in reversed(range(count)):
        state = value_and_gradient(energy, torch.addcmul(state.position, step_size, momentum))
        share = 1.0 if remaining else 0.5
        momentum = torch.addcmul(momentum, backward, state.gradient, value=share)
    return state, momentum


def augmented_leapfrog(
    state: State,
    momentum: Tensor,
    direction: Tensor,
    energy: Energy,
    step_size: Tensor,
    mask: Tensor,
    momentum_update: Callable[[Tensor, Tensor], Update],
    position_update: Callable[[Tensor, Tensor], Update],
) -> tuple[State, Tensor, Tensor]:
    r"""Take one leapfrog of L2HMC; return the state, the momentum and log|det J|.

    Each of the four sub-updates is affine in the block that it changes,

    .. math::
        v' &= v e^{\frac{ε}{2} S_v} - \tfrac{ε}{2} (∂U(x) e^{ε Q_v} + T_v)  \\
        x'_m &= x_m e^{ε S_x} + ε (v' e^{ε Q_x} + T_x)

    (momentum, one half of the position, the other half, momentum), so that the backward direction
    solves the same equations for the block: d = -1 is the exact inverse of d = +1 with the mask
    complemented.

    Arguments:
        state: Position, energy and gradient of the chains.
        momentum: v, (B, D).
        direction: d, ±1, (B,).
        energy: U, from (B, D) to (B,).
        step_size: ε, (B, 1).
        mask: Which coordinates move first, boolean, (B, D).
        momentum_update: S_v, T_v and Q_v from (x, ∂U(x)).
        position_update: S_x, T_x and Q_x from (the other half of x, v).

    References:
        Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
        Sohl-Dickstein, 2018), Section 4 and Appendix A.
    """
    sign = direction[:, None]

    def kick(state: State, momentum: Tensor) -> tuple[Tensor, Tensor]:
        update = momentum_update(state.position, state.gradient)
        force = state.gradient * torch.exp(step_size * update.gate) + update.translation
        log_scale = 0.5 * step_size * update.scale
        return affine(momentum, log_scale, -0.5 * step_size * force, sign)

    def drift(position: Tensor, momentum: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        update = position_update(torch.where(moving, 0.0, position), momentum)
        velocity = momentum * torch.exp(step_size * update.gate) + update.translation
        log_scale = step_size * update.scale
        moved, change = affine(position, log_scale, step_size * velocity, sign)
        return torch.where(moving, moved, position), torch.where(moving, change, 0.0)

    momentum, change_1 = kick(state, momentum)
    position, change_2 = drift(state.position, momentum, mask)
    position, change_3 = drift(position, momentum, ~mask)
    end = value_and_gradient(energy, position)
    momentum, change_4 = kick(end, momentum)
    return end, momentum, (change_1 + change_2 + change_3 + change_4).sum(dim=-1)


def affine(
    block: Tensor, log_scale: Tensor, shift: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return a·y + b forward and (y - b)/a backward, with log|a| and -log|a| per coordinate.

    Arguments:
        block: y, (B, D).
        log_scale: log a, (B, D).
        shift: b, (B, D).
        direction: ±1, (B, 1).
    """
    change = direction * log_scale
    scale = torch.exp(change)
    moved = torch.where(direction > 0, scale * block + shift, scale * (block - shift))
    return moved, change
