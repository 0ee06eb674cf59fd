"""Hamiltonian Monte Carlo."""

import math
from numbers import Integral

import torch
from torch import Tensor

from samplers.energy import Energy, State, value_and_gradient
from samplers.kernel import Context, Endpoint, Kernel, Noise, PhasePoint

JITTER = 0.5
"""What suits HMC whose trajectory nobody has chosen with the target in mind."""

_ONE_REGION = 20
"""Leapfrogs up to which a step is compiled as one: the time that takes grows with each."""
_PIECE = 10
"""Leapfrogs of a longer trajectory that are compiled together, whatever its length."""


class HMC(Kernel):
    r"""Hamiltonian Monte Carlo with a fixed number of leapfrogs and unit mass.

    The proposal follows H(x, v) = U(x) + vᵀv / 2 for ``num_leapfrogs`` steps of size ε:

    .. math::
        v' = v - \tfrac{ε}{2} ∂U(x), \quad x' = x + ε v', \quad v'' = v' - \tfrac{ε}{2} ∂U(x')

    Arguments:
        num_leapfrogs: M, leapfrogs a proposal.
        step_size: The initial ε; kept as a buffer, so that adaptation travels with the kernel.
        jitter: Each step takes ε times a number drawn between 1 - ``jitter`` and 1. A trajectory
            as long as half a period of a coordinate, or a whole one, leads back to where it began,
            however high its acceptance: with 0.5 no number of leapfrogs stands still like that.

    Raises:
        ValueError: M is below 1, ε is not a positive number, or the jitter not in [0, 1).

    References:
        MCMC using Hamiltonian dynamics (Neal, 2011), Section 3; of the jitter, 3.2.

    Example:
        >>> import torch
        >>> from samplers import HMC
        >>> kernel = HMC(num_leapfrogs=5, step_size=0.3)
        >>> energy = lambda x: 0.5 * x.square().sum(dim=-1)
        >>> state = kernel.init(torch.zeros(4, 2), energy)
        >>> state, info = kernel.step(state, energy, kernel.noise(state))
        >>> info.acceptance.shape
        torch.Size([4])
    """

    def __init__(self, num_leapfrogs: int = 5, step_size: float = 0.1, jitter: float = 0.0) -> None:
        super().__init__()
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be at least 0 and below 1, got {jitter}")
        self.num_leapfrogs = num_leapfrogs
        self.jitter = jitter
        self.register_buffer("log_step_size", initial_log_step_size(num_leapfrogs, step_size))

    @property
    def step_is_one_region(self) -> bool:  # type: ignore[override]
        """Not with more than twenty leapfrogs, which are compiled in turns of ten then."""
        return self.num_leapfrogs <= _ONE_REGION

    def noise(self, state: State, generator: torch.Generator | None = None) -> Noise:
        """Draw the randomness of one step; jitter shortens the direction in time."""
        if self.jitter == 0:
            return super().noise(state, generator)
        like = state.energy
        share = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        noise = super().noise(state, generator)
        return noise._replace(direction=noise.direction * (1 - self.jitter * share))

    def integrate(self, start: PhasePoint, energy: Energy, context: Context = None) -> Endpoint:
        """Take ``num_leapfrogs`` leapfrogs, which preserve volume: log|det J| = 0."""
        state, momentum, direction = start
        step_size = direction[:, None] * self.step_size.to(momentum.dtype)
        take, piece = leapfrogs, self.num_leapfrogs
        if not self.step_is_one_region and self.is_compiled:
            take, piece = self.compiled(leapfrogs), _PIECE
        for done in range(0, self.num_leapfrogs, piece):
            count = min(piece, self.num_leapfrogs - done)
            state, momentum = take(state, momentum, energy, step_size, count)
        return Endpoint(state, momentum, torch.zeros_like(state.energy))


def initial_log_step_size(num_leapfrogs: int, step_size: float) -> Tensor:
    """Return log ε as a 0-d tensor, after checking both settings of a leapfrog integrator."""
    if not isinstance(num_leapfrogs, Integral):
        raise TypeError(f"num_leapfrogs must be an integer, got {num_leapfrogs!r}")
    if num_leapfrogs < 1:
        raise ValueError(f"num_leapfrogs must be at least 1, got {num_leapfrogs}")
    if not (step_size > 0 and math.isfinite(step_size)):
        raise ValueError(f"step_size must be a positive number, got {step_size}")
    return torch.tensor(math.log(step_size))


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
