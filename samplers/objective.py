"""The loss that trains a sampler: the reciprocal of the expected squared jump distance."""

from torch import Tensor

from samplers.kernel import Info

SOFTENING = 1e-4
"""Added to the expected jump, so that a chain that does not move has a finite loss."""


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
