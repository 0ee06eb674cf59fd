"""Adaptation of a kernel to its target: step size and mass, frozen before the draws that count."""

import math
import warnings
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from samplers.chains import ENOUGH_TO_MOVE
from samplers.energy import Energy, State
from samplers.hmc import HMC
from samplers.kernel import Context, Kernel, finite_start
from samplers.preconditioned import Preconditioned
from samplers.turns import Turns

Mass = Literal["unit", "diagonal", "dense"]

TARGET_ACCEPTANCE = 0.65
"""The acceptance at which HMC moves farthest for its cost in high dimensions."""

_WINDOWS, _WINDOWS_OF_FEW = (0.15, 0.1, 0.2, 0.4, 0.15), (0.2, 0.4, 0.4)
"""Shares of the warm-up; the mass is set after each of the inner ones, from its draws alone."""
_FEW = 400
"""Steps below which the windows are those of few, or the last would be too short to find ε."""
_PRIOR_DRAWS, _PRIOR_SHARE = 5, 1e-3
"""The covariance is shrunk as by five draws with a thousandth of the variances, in any unit."""
_SETTLING_LEAPFROGS = 3
_LONGEST_SETTLING = 150
_UNMOVED_VARIANCE = 1e-3
"""Of a coordinate in which no chain has moved yet."""
_SHRINKAGE = 0.5


class Adapted(NamedTuple):
    """What a warm-up leaves."""

    kernel: Kernel
    """Frozen; wrapped in :class:`samplers.Preconditioned` where its mass was adapted."""
    position: Tensor
    """Where the chains are, (B, D)."""


class Moments(NamedTuple):
    """Mean and covariance of the draws so far."""

    mean: Tensor
    """(D,)."""
    covariance: Tensor
    """(D, D)."""

    @classmethod
    def of(cls, draws: Tensor) -> "Moments":
        """Return the moments of draws (B, D), the covariance with denominator B."""
        mean = draws.mean(dim=0)
        centred = draws - mean
        return cls(mean, centred.T @ centred / len(draws))

    def mixed(self, other: "Moments", weight: float) -> "Moments":
        r"""Return the moments of the mixture (1 - w) · self + w · other.

        .. math:: Σ' = (1 - w) Σ_1 + w Σ_2 + w (1 - w) (μ_2 - μ_1)(μ_2 - μ_1)^\top

        With w = 1/n at the n-th of equally large batches these are the moments of all of them.
        """
        step = other.mean - self.mean
        between = weight * (1 - weight) * torch.outer(step, step)
        covariance = torch.lerp(self.covariance, other.covariance, weight) + between
        return Moments(self.mean + weight * step, covariance)


@torch.no_grad()
def settle(
    energy: Energy,
    position: Tensor,
    num_steps: int = 150,
    *,
    step_size: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move chains to where the density is, each with a step size of its own.

    From broad starts some chains face forces a hundred times those of others: with a step size
    for all they would never move, and spoil the mass that a warm-up estimates from them. Short
    HMC, whose log ε follows each chain's own acceptance; its draws are for nothing else.

    Arguments:
        energy: U, from (B, D) to (B,).
        position: Where the chains start, (B, D).
        num_steps: Of three leapfrogs each.
        step_size: The first one of all chains.
        generator: Of the noise.

    Returns:
        Where the chains are, (B, D).
    """
    kernel = HMC(_SETTLING_LEAPFROGS, step_size)
    state = finite_start(kernel, energy, position)
    kernel.to(state.position)
    kernel.log_step_size = kernel.log_step_size.expand(len(state.position), 1).clone()
    for _ in range(num_steps):
        state, info = kernel.step(state, energy, kernel.noise(state, generator))
        missing = info.acceptance.nan_to_num(0.0, 0.0, 0.0) - TARGET_ACCEPTANCE
        kernel.log_step_size += 0.5 * missing[:, None]
    return state.position


class DualAveraging:
    r"""The step size that reaches a target acceptance, by Nesterov's dual averaging.

    While the acceptance stays on one side of A*, ε is doubled or halved. From the ε₀ where it
    crosses, for t = 1, 2, …:

    .. math::
        \bar H_t &= \bigl(1 - \tfrac{1}{t + t_0}\bigr) \bar H_{t-1} + \tfrac{A^* - A_t}{t + t_0},
        \quad \log ε_t = \log ε_0 - \tfrac{\sqrt t}{γ} \bar H_t, \\
        \log \bar ε_t &= t^{-κ} \log ε_t + (1 - t^{-κ}) \log \bar ε_{t-1}

    with t₀ = 10 and κ = 0.75. Here γ = 0.5 and the centre is ε₀, not the paper's 0.05 and 10 ε₀:
    those find the scale of ε too, from one noisy chain, and swing where A_t is the mean of many.

    Arguments:
        log_step_size: log ε to begin with.
        target: A*, in (0, 1).

    References:
        The No-U-Turn Sampler (Hoffman and Gelman, 2014), Section 3.2 and, of the doubling,
        Algorithm 4.
    """

    def __init__(self, log_step_size: Tensor, target: float) -> None:
        self.centre = log_step_size.detach().clone()
        self.target = target
        self.direction: float | None = None
        self.count = 0
        self.shortfall = torch.zeros_like(self.centre)
        self.average = self.centre

    def update(self, acceptance: Tensor) -> Tensor:
        """Return the next log ε after a step with acceptance probabilities (B,)."""
        missing = self.target - acceptance.nan_to_num(0.0, 0.0, 0.0).mean()
        if self.count == 0:
            direction = -1.0 if missing > 0 else 1.0
            self.direction = self.direction or direction
            if direction == self.direction:
                tried, self.centre = self.centre, self.centre + direction * math.log(2)
                # Should no step follow: the larger one has not been tried.
                self.average = torch.minimum(tried, self.centre)
                return self.centre
        self.count += 1
        share = 1 / (self.count + 10)
        self.shortfall = torch.lerp(self.shortfall, missing.to(self.shortfall), share)
        log_step_size = self.centre - math.sqrt(self.count) / _SHRINKAGE * self.shortfall
        self.average = torch.lerp(self.average, log_step_size, self.count**-0.75)
        return log_step_size


@torch.no_grad()
def adapt(
    kernel: Kernel,
    energy: Energy,
    position: Tensor,
    num_steps: int = 500,
    *,
    mass: Mass = "unit",
    target: float = TARGET_ACCEPTANCE,
    context: Context = None,
    generator: torch.Generator | None = None,
) -> Adapted:
    """Warm chains up: step size by dual averaging, mass from the draws of all chains.

    Works for any kernel but turns, a learned one too: with a mass it runs in whitened coordinates.
    Neither changes after the warm-up, so that draws from the returned kernel are exact. The first
    quarter of the steps, 150 at most, are those of :func:`settle`; a chain that is stuck all the
    same takes no part in the mass, and is warned of.

    Arguments:
        kernel: Its step size is set in place.
        energy: U, from (B, D) to (B,).
        position: Where the chains start, (B, D).
        num_steps: Steps of the warm-up, at least 20, with a mass 30.
        mass: "unit", "diagonal" or "dense": the inverse of the draws' variances or covariance.
        target: Acceptance probability to reach.
        context: As returned by ``kernel.embed``.
        generator: Of the noise; without one, torch's global generator.

    Raises:
        ValueError: An argument is out of range, or the energy or its gradient is not finite where
            a chain starts.
        TypeError: The kernel has :class:`samplers.Turns`.

    References:
        The windows follow Stan's (Stan Reference Manual, "HMC algorithm parameters"), the draws
        of many chains pooled in place of one chain's.

    Example:
        >>> import torch
        >>> from samplers import HMC, adapt, sample
        >>> energy = lambda x: 0.5 * (x / torch.tensor([0.1, 10.0])).square().sum(dim=-1)
        >>> warm = adapt(HMC(), energy, torch.zeros(20, 2), num_steps=50, mass="diagonal")
        >>> sample(warm.kernel, energy, warm.position, num_draws=5).draws.shape
        torch.Size([20, 5, 2])
    """
    if mass not in ("unit", "diagonal", "dense"):
        raise ValueError(f"mass must be 'unit', 'diagonal' or 'dense', got {mass!r}")
    least = 20 if mass == "unit" else 30
    if num_steps < least:
        raise ValueError(f"num_steps must be at least {least}, got {num_steps}")
    if any(isinstance(each, Turns) for each in kernel.modules()):
        raise TypeError("adapt each kernel before they take turns: each has a step size of its own")
    if not 0 < target < 1:
        raise ValueError(f"target must lie between 0 and 1, got {target}")
    state = finite_start(kernel, energy, position)
    settling = _settling_steps(num_steps)
    step_size = float(kernel.step_size)
    position = settle(energy, state.position, settling, step_size=step_size, generator=generator)
    state, moving = kernel.init(position, energy), kernel
    averaging = DualAveraging(kernel.log_step_size, target)
    moved = torch.zeros(len(position), dtype=torch.bool, device=position.device)
    windows = _WINDOWS if num_steps >= _FEW else _WINDOWS_OF_FEW
    ends = [round(share * (num_steps - settling)) for share in accumulate(windows)]
    for index, (begin, end) in enumerate(pairwise([0, *ends])):
        steps = end - begin
        before = moved
        state, moments, moved = _window(moving, energy, state, steps, averaging, context, generator)
        if mass != "unit" and 0 < index < len(windows) - 1:
            factor = mass_factor(moments, steps * int(moved.sum()), mass)
            if moving is kernel:  # later windows change the coordinates little
                kernel.log_step_size.fill_(0.0)
            moving = Preconditioned(kernel, moments.mean, factor).to(position.device)
            averaging = DualAveraging(kernel.log_step_size, target)
    stuck, steps = ~(before | moved), ends[-1] - ends[-3]
    if steps >= ENOUGH_TO_MOVE and stuck.any():
        warnings.warn(
            f"{int(stuck.sum())} of {len(stuck)} chains did not move in the last {steps} steps of "
            "the warm-up: start them closer to where the density is, or warm up for longer",
            stacklevel=3,
        )
    return Adapted(moving, state.position)


def warm_up_gradients(num_steps: int, num_leapfrogs: int) -> int:
    """Return the gradients that :func:`adapt` takes of each chain, of HMC or L2HMC."""
    settling = _settling_steps(num_steps)
    return 3 + settling * _SETTLING_LEAPFROGS + (num_steps - settling) * num_leapfrogs


def _settling_steps(num_steps: int) -> int:
    return min(num_steps // 4, _LONGEST_SETTLING)


def _window(
    kernel: Kernel,
    energy: Energy,
    state: State,
    num_steps: int,
    averaging: DualAveraging,
    context: Context,
    generator: torch.Generator | None,
) -> tuple[State, Moments, Tensor]:
    """Adapt the step size for some steps.

    Returns:
        The state, the moments of the draws of chains that have moved, and which have, (B,).
    """
    moments, count = Moments.of(state.position), 0
    moved = torch.zeros_like(state.energy, dtype=torch.bool)
    for _ in range(num_steps):
        state, info = kernel.step(state, energy, kernel.noise(state, generator), context)
        kernel.log_step_size.copy_(averaging.update(info.acceptance))
        moved |= info.accepted
        if moved.any():  # a chain that is stuck would spoil the mass
            draws = state.position[moved]
            count += len(draws)
            moments = moments.mixed(Moments.of(draws), len(draws) / count)
    kernel.log_step_size.copy_(averaging.average)
    return state, moments, moved


def mass_factor(moments: Moments, count: int, mass: Mass) -> Tensor:
    """Return L of the draws' covariance, shrunk a little.

    Its variances toward a thousandth of themselves, and the correlations toward 0 as much as keeps
    it positive definite where there are fewer draws than dimensions.
    """
    weight = _PRIOR_DRAWS / (count + _PRIOR_DRAWS)
    variances = moments.covariance.diagonal()
    variances = torch.where(variances > 0, variances, _UNMOVED_VARIANCE)
    if mass == "diagonal":
        return ((1 - weight) * variances + weight * _PRIOR_SHARE * variances).sqrt()
    scales = variances.sqrt().double()
    correlation = moments.covariance.double() / scales[:, None] / scales
    correlation.fill_diagonal_(1.0)
    identity = torch.eye(len(scales)).to(correlation)
    shrunk = (1 - weight) * correlation + weight * _PRIOR_SHARE * identity
    return (scales[:, None] * torch.linalg.cholesky(shrunk)).to(moments.covariance)


@torch.no_grad()
def track_acceptance(
    kernel: Kernel, acceptance: Tensor, target: float = TARGET_ACCEPTANCE, gain: float = 0.05
) -> None:
    r"""Move the step size toward a target acceptance, in place.

    .. math:: \log ε ← \log ε + γ (\bar A - A^*)

    The gain γ is constant, because the target distribution of a model in training never settles.
    The draws taken while the step size follows its own chain are not exactly invariant: freeze it
    (stop calling this) before draws that count.

    Arguments:
        kernel: Its ``log_step_size`` changes.
        acceptance: Acceptance probabilities of the last steps, any shape; non-finite ones count 0.
        target: A*, in (0, 1).
        gain: γ.

    References:
        A tutorial on adaptive MCMC (Andrieu and Thoms, 2008), Section 5.1.2.
        The optimal 0.65: Optimal tuning of the hybrid Monte Carlo algorithm (Beskos, Pillai,
        Roberts, Sanz-Serna and Stuart, 2013).
    """
    kernel.log_step_size.add_(acceptance.nan_to_num(0.0, 0.0, 0.0).mean() - target, alpha=gain)
