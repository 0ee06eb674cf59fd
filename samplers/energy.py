"""Potential energies: their value and gradient, and what a chain keeps of them."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


class State(NamedTuple):
    """What a chain needs to go on; stale as soon as the energy changes."""

    position: Tensor
    """Points of the chains, (B, D)."""
    energy: Tensor
    """U(position) in nats, (B,)."""
    gradient: Tensor
    """The gradient of U at the position, (B, D)."""
    extra: tuple[Tensor, ...] = ()
    """What an :class:`EnergyWithGradient` wants kept beside, (B, …) each."""


@runtime_checkable
class EnergyWithGradient(Protocol):
    """An energy that brings its own gradient.

    Whatever it puts into the state's ``extra`` follows the chain through acceptance and rejection.
    """

    def value_and_gradient(self, position: Tensor) -> State:
        """Return the state at ``position`` (B, D).

        Where gradients are enabled and ``position`` requires them, as in the training of a
        sampler, energy and gradient must be differentiable in it.
        """
        ...


Energy = Callable[[Tensor], Tensor] | EnergyWithGradient
"""U(z) = -log p(z) + constant, from (B, D) to (B,) nats; the rows are independent."""


def value_and_gradient(energy: Energy, position: Tensor) -> State:
    r"""Return position, U(position) and its gradient.

    Where gradients are enabled and ``position`` requires them, the result is differentiable, to
    second order in U. Elsewhere it is detached, from the parameters inside ``energy`` too.

    Rows at which the energy raises because of where they are (see :func:`is_outside`) are NaN.

    Arguments:
        energy: U, from (B, D) to (B,); or an object with ``value_and_gradient(position) -> State``.
        position: The points, (B, D).

    Raises:
        ValueError: The energy does not return one number a row, does not depend on the position as
            far as torch sees, or brings a gradient of another shape, or not differentiable where
            it must be.
        TypeError: It is no function, or brings no :class:`State`.
    """
    if torch.compiler.is_compiling():
        return evaluated(energy, position)
    try:
        return evaluated(energy, position)
    except (RuntimeError, ValueError) as error:
        if not is_outside(error):
            raise
        return _rows_apart(energy, position)


def is_outside(error: Exception) -> bool:
    """Say whether an energy raised because of the position, not because it is written wrong.

    That is a failed factorisation, or a distribution's own check of its values or parameters.
    """
    failed = isinstance(error, torch.linalg.LinAlgError | np.linalg.LinAlgError)
    return failed or (isinstance(error, ValueError) and "found invalid values" in str(error))


def _rows_apart(energy: Energy, position: Tensor) -> State:
    """Find the rows at which the energy can be evaluated, by bisection; the others are NaN.

    Rows in question stand in for all others, as energies may know something of each row.
    """
    count, device = len(position), position.device
    inside, state = torch.zeros(count, dtype=torch.bool, device=device), None
    pending = list(position.isfinite().all(dim=-1).nonzero()[:, 0].chunk(2))
    while pending:
        rows = pending.pop()
        if len(rows) == 0:
            continue
        stand_in = rows[torch.arange(count, device=device) % len(rows)]
        stand_in[rows] = rows
        try:
            found = evaluated(energy, position[stand_in])
        except (RuntimeError, ValueError) as error:
            if not is_outside(error):
                raise
            pending += rows.chunk(2) if len(rows) > 1 else ()
            continue
        here = torch.zeros_like(inside)
        here[rows] = True
        state, inside = found if state is None else chosen(here, found, state), inside | here
    nowhere = torch.full_like(position, torch.nan)
    outside = State(position, nowhere.sum(dim=-1), nowhere)
    if state is None:
        return outside
    return chosen(inside, state, outside._replace(extra=state.extra))._replace(position=position)


def twice(state: State) -> State:
    """Return the state of two chains at each of these places, (2B, …), one set after the other."""
    position, energy, gradient = (torch.cat([each, each]) for each in state[:3])
    extra = tuple(torch.cat([each, each]) for each in state.extra)
    return State(position, energy, gradient, extra)


def chosen(rows: Tensor, first: State, second: State) -> State:
    """Return the state that is the first one in some rows (B,), boolean, and else the second."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(rows.reshape(-1, *[1] * (new.dim() - 1)), new, old)

    # Where an energy raised in all rows it left nothing extra.
    pairs = zip(first.extra or second.extra, second.extra, strict=True)
    return State(
        choose(first.position, second.position),
        choose(first.energy, second.energy),
        choose(first.gradient, second.gradient),
        tuple(choose(*pair) for pair in pairs),
    )


def evaluated(energy: Energy, position: Tensor) -> State:
    """Return :func:`value_and_gradient`, but raise whatever the energy raises."""
    if isinstance(energy, EnergyWithGradient):
        return _checked(energy.value_and_gradient(position), position)
    if not callable(energy):
        raise TypeError(
            "an energy is a function from positions (B, D) to (B,), got "
            f"{type(energy).__name__}; DistributionEnergy makes one of a distribution"
        )
    # torch.func.grad is what works inside a compiled region and in inference mode;
    # elsewhere autograd.grad is two to three times faster.
    if torch.compiler.is_compiling():
        return _by_transform(energy, position)
    if torch.is_inference_mode_enabled():
        # Inside inference mode torch 2.11 returns zeros for the gradient, without a word.
        with torch.inference_mode(False), torch.no_grad():
            return _by_transform(energy, position.clone())
    differentiable = torch.is_grad_enabled() and position.requires_grad
    with torch.enable_grad():
        leaf = position if differentiable else position.detach().requires_grad_()
        total, value = _summed(energy, leaf)
        if not total.requires_grad:
            raise ValueError(
                "the energy does not depend on the position as far as torch sees: compute it from "
                "it by torch, without detach or NumPy, or bring a gradient in value_and_gradient"
            )
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=differentiable)
    return State(position, value if differentiable else value.detach(), gradient)


def _checked(state: State, position: Tensor) -> State:
    """Return the state; of other shapes, or detached in training, it would mislead silently."""
    if not isinstance(state, State):
        raise TypeError(
            "value_and_gradient of an energy returns a State(position, energy, gradient), got "
            f"{type(state).__name__}"
        )
    shapes, needed = (
        (state.energy.shape, state.gradient.shape),
        (position.shape[:1], position.shape),
    )
    if shapes != needed:
        raise ValueError(
            "value_and_gradient of an energy returns energy and gradient of shapes "
            f"{' and '.join(str(tuple(shape)) for shape in needed)} at positions "
            f"{tuple(position.shape)}, got {' and '.join(str(tuple(shape)) for shape in shapes)}"
        )
    trained = torch.is_grad_enabled() and position.requires_grad
    if trained and not state.energy.requires_grad:
        raise ValueError(
            "value_and_gradient of the energy returns one without a gradient, from which no "
            "sampler can be trained: compute it from position, with gradients enabled"
        )
    return state


class Tempered:
    """U/T, the temperature a tensor: a compiled kernel stays compiled as it changes.

    Arguments:
        energy: U, from (B, D) to (B,).
        temperature: T, 0-d or one a row, (B,).
    """

    def __init__(self, energy: Energy, temperature: Tensor) -> None:
        self.energy = energy
        self.temperature = temperature

    def value_and_gradient(self, position: Tensor) -> State:
        """Return the state at ``position`` (B, D)."""
        state = value_and_gradient(self.energy, position)
        scaled = state.gradient / self.temperature[..., None]
        return State(position, state.energy / self.temperature, scaled, state.extra)


class Counted:
    """An energy that counts the gradients that were taken of it, over all chains.

    Arguments:
        energy: U, from (B, D) to (B,).
        told: Called with the number of each evaluation.
    """

    def __init__(self, energy: Energy, told: Callable[[int], None] = lambda count: None) -> None:
        self.energy = energy
        self.told = told
        self.count = 0

    def value_and_gradient(self, position: Tensor) -> State:
        """Return the state at ``position`` (B, D)."""
        self.count += len(position)
        self.told(len(position))
        return value_and_gradient(self.energy, position)


class Smoothed:
    r"""An energy whose second derivatives, in a backward pass, are differences over a length h.

    .. math:: ∂^2U(x)\, u ≈ |u| \, \frac{∂U(x + h \hat u) - ∂U(x - h \hat u)}{2h}

    Energies and gradients stay exact: only the training of a sampler sees the curvature that a
    ripple finer than h leaves. It costs two gradients where a double backward would be taken.

    Arguments:
        energy: U, from (B, D) to (B,).
        length: h, in units of the position.
    """

    def __init__(self, energy: Energy, length: float) -> None:
        self.energy = energy
        self.length = length

    def value_and_gradient(self, position: Tensor) -> State:
        """Return the state at ``position`` (B, D)."""
        if not (torch.is_grad_enabled() and position.requires_grad):
            return value_and_gradient(self.energy, position)
        return State(position, *_CoarseCurvature.apply(position, self.energy, self.length))


class _CoarseCurvature(torch.autograd.Function):
    @staticmethod
    def forward(context, position, energy, length):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        state = value_and_gradient(energy, position)
        context.energy, context.length = energy, length
        context.save_for_backward(position, state.gradient)
        return state.energy, state.gradient

    @staticmethod
    def backward(context, of_energy, of_gradient):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        position, gradient = context.saved_tensors
        size = of_gradient.norm(dim=-1, keepdim=True)
        step = context.length * of_gradient / size.clamp(min=torch.finfo(size.dtype).tiny)
        ends = torch.cat([position + step, position - step])
        ahead, behind = value_and_gradient(context.energy, ends).gradient.chunk(2)
        curvature = size * (ahead - behind) / (2 * context.length)
        return of_energy[:, None] * gradient + curvature, None, None


def fresh_leaf(state: State) -> State:
    """Cut a state off from what it was computed from; let it require gradients where enabled.

    A state does after a differentiable step; where the first one did not, the compiler would
    compile a step twice.
    """
    differentiable = torch.is_grad_enabled()
    position, energy, gradient = (
        field.detach().requires_grad_(differentiable) for field in state[:3]
    )
    return State(position, energy, gradient, state.extra)


def _by_transform(energy: Callable[[Tensor], Tensor], position: Tensor) -> State:
    gradient, (_, value) = torch.func.grad_and_value(lambda z: _summed(energy, z), has_aux=True)(
        position
    )
    return State(position, value, gradient)


def _summed(energy: Callable[[Tensor], Tensor], position: Tensor) -> tuple[Tensor, Tensor]:
    value = energy(position)
    if not isinstance(value, Tensor):
        raise ValueError(f"an energy must return a tensor, but it returned {type(value).__name__}")
    if value.shape != position.shape[:1]:
        raise ValueError(
            f"an energy must map positions {tuple(position.shape)} to one number a row, "
            f"{tuple(position.shape[:1])}, but it returned {tuple(value.shape)}"
        )
    return value.sum(), value


class _FiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, tensor):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context, gradient):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def finite_gradient(tensor: Tensor) -> Tensor:
    """Return ``tensor`` itself, with non-finite numbers of its gradient replaced by zero.

    A chain that has diverged gets the gradient 0 from its loss, which the chain rule then
    multiplies by infinite factors; without a gate the resulting NaN would reach the parameters
    that all chains share.
    """
    return _FiniteGradient.apply(tensor) if tensor.requires_grad else tensor
