"""The Metropolis independence sampler."""

import torch

from samplers.energy import Energy, value_and_gradient
from samplers.kernel import Context, Endpoint, Kernel, PhasePoint


class Independence(Kernel):
    r"""Proposals from N(0, I), whatever the state: in whitened coordinates, from a fitted density.

    The proposal swaps position and momentum, (x, v) ↦ (v, x), a volume-preserving map that is its
    own inverse. With v ~ N(0, I) the kernel's acceptance is that of an independence sampler,

    .. math:: A = \min\bigl(1, e^{U(x) - U(v)} \, φ(x) / φ(v)\bigr)

    Inside :class:`samplers.Preconditioned` it proposes from N(μ, L Lᵀ), inside
    :class:`samplers.Flow` from the flow. It is the yardstick of learned kernels: where it is as
    good, a Gaussian or a flow is all there is to learn.

    References:
        Markov chains for exploring posterior distributions (Tierney, 1994), Section 2.3.3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_leapfrogs = 1
        self.register_buffer("log_step_size", torch.zeros(()))

    def integrate(self, start: PhasePoint, energy: Energy, context: Context = None) -> Endpoint:
        """Swap position and momentum."""
        end = value_and_gradient(energy, start.momentum)
        return Endpoint(end, start.state.position, torch.zeros_like(end.energy))
