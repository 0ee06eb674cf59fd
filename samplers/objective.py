"""What the training of a sampler minimises: siblings, jumps, or the paper's reciprocal."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers.kernel import Info

SOFTENING = 1e-4
"""Added to the expected jump, so that a chain that does not move has a finite loss."""

_SIBLINGS_RATE, _JUMPS_RATE = 0.05, 0.02
_LEAST_SHARE = 1e-3
"""Of a feature's variance: what moves less counts in the loss as if it moved this much."""
_RIDGE = 1e-2
"""Directions in which jumps have less than this share of their coordinates' moment count less."""


class RunningMeans:
    r"""Running means of batches, by name, through which no gradient flows.

    .. math:: \bar a ← \bar a + \max(1/n, r) (a - \bar a)

    at the n-th batch since the start, so that the first ones count alike.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def update(self, name: str, batch: Tensor, rate: float) -> Tensor:
        """Return the mean after one more batch."""
        batch = batch.detach()
        count = self.counts[name] = self.counts.get(name, 0) + 1
        mean = batch if count == 1 else torch.lerp(self.values[name], batch, max(1 / count, rate))
        self.values[name] = mean
        return mean

    def restart(self) -> None:
        """Forget everything, as after a change of the coordinates."""
        self.values, self.counts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return plain data, for a checkpoint."""
        return {"values": dict(self.values), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.values = {name: value.to(device) for name, value in state["values"].items()}
        self.counts = dict(state["counts"])


class Objective(NamedTuple):
    """What one iteration of training descends, and what it shows."""

    loss: Tensor
    """0-d, differentiable."""
    score: Tensor
    """Progress in the objective's own terms, larger is better, 0-d, detached."""


def siblings(start: Tensor, first: Info, second: Info, running: RunningMeans) -> Objective:
    r"""Reward proposals of one state that differ from each other as much as independent draws.

    From each state x come two proposals x₁, x₂ with independent noise. Of the features
    f = (w, w²), w the standardised coordinates:

    .. math::
        S_k &= E\bigl[A_1 A_2 (f_1 - f_2)^2 + A_1 (1 - A_2) (f_1 - f)^2
            + (1 - A_1) A_2 (f_2 - f)^2\bigr] / 2 \operatorname{Var} f_k \\
        J_k &= E\bigl[A_1 (f_1 - f)^2 + A_2 (f_2 - f)^2\bigr] / 4 \operatorname{Var} f_k \\
        \mathrm{loss} &= -\frac{1}{K} \sum_k m_k / \bar m_k, \quad m_k = \min(S_k, J_k)

    with running means that no gradient reaches: Var f_k, which of S_k and J_k is smaller, and
    :math:`\bar m_k`, which makes the loss that of Σ log m_k. S = E Var(f(x') | x) / Var f is
    1 - ρ₂ of a reversible kernel, and J = 1 - ρ₁: a leap to the mirror image has J = 2 and S = 0.

    Arguments:
        start: x, in the kernel's coordinates, (B, D).
        first: Of the step from there to x₁.
        second: Of the other step from there, to x₂.
        running: Of this training.

    Returns:
        The loss, and the mean of min(S_k, J_k) as score: 1 where every draw is independent.

    References:
        The law of total variance; close in spirit to the generalised speed measure (Titsias and
        Dellaportas, Gradient-based adaptive Markov chain Monte Carlo, 2019).
    """
    mean = running.update("mean", start.mean(dim=0), _SIBLINGS_RATE)
    spread = (start - mean).square().mean(dim=0)
    deviation = running.update("variance", spread, _SIBLINGS_RATE).sqrt()

    def features(position: Tensor) -> Tensor:
        w = (position - mean) / deviation
        return torch.cat([w, w.square()], dim=-1)

    f, f1, f2 = features(start), features(first.proposal), features(second.proposal)
    a1, a2 = first.acceptance[:, None], second.acceptance[:, None]
    apart, moved1, moved2 = squared_differences((f, f1, f2), a1, a2)
    jump = 0.5 * (a1 * moved1 + a2 * moved2)
    variance = running.update("feature variance", f.var(dim=0), _SIBLINGS_RATE)
    s, j = apart.mean(dim=0) / (2 * variance), jump.mean(dim=0) / (2 * variance)
    s_mean, j_mean = (
        running.update(name, each, _SIBLINGS_RATE) for name, each in (("S", s), ("J", j))
    )
    smaller = torch.where(s_mean < j_mean, s, j)
    level = running.update("smaller", smaller, _SIBLINGS_RATE).clamp(min=_LEAST_SHARE)
    return Objective(-(smaller / level).mean(), smaller.detach().mean())


def squared_differences(
    features: tuple[Tensor, Tensor, Tensor], a1: Tensor, a2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how far siblings end apart in expectation, and how far each proposal moves, squared.

    Arguments:
        features: f of the common start and of both proposals, (B, K) each.
        a1: Probability that the first is accepted, (B, 1).
        a2: That of the second.
    """
    start, first, second = features
    moved1, moved2 = (first - start).square(), (second - start).square()
    apart = a1 * a2 * (first - second).square() + a1 * (1 - a2) * moved1 + (1 - a1) * a2 * moved2
    return apart, moved1, moved2


def jumps(start: Tensor, info: Info, running: RunningMeans) -> Objective:
    r"""Reward jumps in all directions, measured in the running moment of the jumps themselves.

    .. math:: \mathrm{loss} = -E\bigl[A\, Δf^\top M^{-1} Δf\bigr], \quad
        M = \overline{E[A\, Δf Δf^\top]}, \quad f = (x, x^2)

    M is a running mean that is not differentiated, its diagonal a hundredth larger; but for that a
    fixed point maximises log det M. Shifts
    and scales of the coordinates leave it alone, so that it suits many leapfrogs in raw
    coordinates.

    Arguments:
        start: x, (B, D).
        info: Of the step from there.
        running: Of this training.

    Returns:
        The loss, which stays near -2D, and ½ log det M as score.
    """
    # Any fixed centre gives the same loss; one near the chains spares rounding errors.
    centre = running.values.setdefault("centre", start.detach().mean(dim=0))
    before, after = start - centre, info.proposal - centre
    change = torch.cat([after - before, after.square() - before.square()], dim=-1)
    weighted = info.acceptance[:, None] * change
    moment = running.update("moment", weighted.T @ change / len(change), _JUMPS_RATE).double()
    scale = moment.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    correlation = moment / scale[:, None] / scale
    factor = torch.linalg.cholesky(correlation + _RIDGE * torch.eye(len(scale)).to(correlation))
    white = torch.linalg.solve_triangular(
        factor, (change / scale.to(change)).double().T, upper=False
    )
    squared = white.square().sum(dim=0).to(change)
    score = scale.log().sum() + factor.diagonal().log().sum()
    return Objective(-(info.acceptance * squared).mean(), score)


def reciprocal(start: Tensor, info: Info, scale: float) -> Objective:
    """Return the paper's loss of :func:`reciprocal_jump_loss`, and δA as score.

    Arguments:
        start: x, (B, D).
        info: Of the step from there.
        scale: λ, the length that counts as a good jump.
    """
    jump = squared_jump(start, info)
    loss = reciprocal_jump_loss(jump, info.acceptance, scale).mean()
    return Objective(loss, (jump * info.acceptance).detach().mean())


def squared_jump(start: Tensor, info: Info, variance: Tensor | None = None) -> Tensor:
    r"""Return the squared distance of the proposals, δ = Σᵢ (x'ᵢ - xᵢ)² / (σᵢ² + 10⁻⁴).

    Arguments:
        start: The positions x that the proposals start from, (B, D).
        info: Of the step from there.
        variance: σ², (B, D) or (D,), to measure each coordinate in; without it, the plain
            distance, which the widest coordinates dominate.

    Returns:
        δ, (B,).
    """
    squared = (info.proposal - start).square()
    if variance is not None:
        squared = squared / (variance + SOFTENING)
    return squared.sum(dim=-1)


def reciprocal_jump_loss(jump: Tensor, acceptance: Tensor, scale: float = 1.0) -> Tensor:
    r"""Return the loss that favours large accepted jumps and abhors chains that stand still.

    .. math:: ℓ_λ = \frac{λ^2}{δA + 10^{-4}} - \frac{δA + 10^{-4}}{λ^2}

    Arguments:
        jump: δ, squared jump distances, (B,).
        acceptance: A, acceptance probabilities, (B,).
        scale: λ, the length that counts as a good jump.

    Returns:
        The loss of each chain, (B,). A diverged chain (A = 0) contributes a constant.

    References:
        Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
        Sohl-Dickstein, 2018), Equation 7; the constant 10⁻⁴ is its released code's.
    """
    expected = (jump * acceptance + SOFTENING) / scale**2
    return expected.reciprocal() - expected
