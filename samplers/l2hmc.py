"""Learned Hamiltonian Monte Carlo (L2HMC)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samplers.energy import Energy, State, finite_gradient
from samplers.hmc import initial_log_step_size
from samplers.kernel import Context, Endpoint, Kernel, PhasePoint
from samplers.leapfrog import Update, augmented_leapfrog
from samplers.networks import UpdateNetwork, embedding_network


class L2HMC(Kernel):
    r"""Hamiltonian Monte Carlo whose leapfrogs are scaled, shifted and gated by trained networks.

    Exact whatever its weights: each leapfrog is invertible with a known Jacobian, the direction
    d = ±1 is drawn anew for every proposal, and d = -1 applies the inverse, leapfrogs in reverse
    order. With S = T = Q = 0 it is :class:`samplers.HMC`. A leapfrog, for d = 1:

    .. math::
        v' &= v ⊙ e^{\frac{ε}{2} S_v} - \tfrac{ε}{2} (∂U(x) ⊙ e^{ε Q_v} + T_v) \\
        x' &= x_{\bar m} + m ⊙ [x ⊙ e^{ε S_x} + ε (v' ⊙ e^{ε Q_x} + T_x)] \\
        x'' &= x'_m + \bar m ⊙ [x' ⊙ e^{ε S_x} + ε (v' ⊙ e^{ε Q_x} + T_x)] \\
        v'' &= v' ⊙ e^{\frac{ε}{2} S_v} - \tfrac{ε}{2} (∂U(x'') ⊙ e^{ε Q_v} + T_v)

    with a random half m of the coordinates and its complement; S, T and Q see what is not
    updated, and the time.

    Arguments:
        dim: D, coordinates of the position.
        num_leapfrogs: M, leapfrogs a proposal.
        step_size: The initial ε; its logarithm is a trained parameter.
        hidden: Units in each hidden layer of the networks.
        head_scale: Factor on the initial weights of the heads of S, T and Q.
        observation_dim: N, if the energy is conditioned on observations (B, N) that the networks
            shall see, through :meth:`embed`.
        embedding_hidden: Units in the hidden layers of that embedding.

    Raises:
        ValueError: A size is below 1, ε is not a positive number, or ``step`` gets a context
            where the kernel has no embedding (or the reverse).

    References:
        Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
        Sohl-Dickstein, 2018), Section 4.

    Example:
        >>> import torch
        >>> from samplers import L2HMC, sample
        >>> kernel = L2HMC(dim=2, num_leapfrogs=5)
        >>> energy = lambda x: 0.5 * x.square().sum(dim=-1)
        >>> sample(kernel, energy, torch.zeros(4, 2), num_draws=10).draws.shape
        torch.Size([4, 10, 2])
    """

    step_is_one_region = False
    """All leapfrogs share one: a step as one region takes M times as long to compile."""

    mask: Tensor
    times: Tensor

    def __init__(
        self,
        dim: int,
        num_leapfrogs: int = 10,
        step_size: float = 0.1,
        hidden: int = 100,
        head_scale: float = 0.001,
        observation_dim: int | None = None,
        embedding_hidden: Sequence[int] = (512, 512),
    ) -> None:
        super().__init__()
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim and hidden must be at least 1, got {dim} and {hidden}")
        if min(embedding_hidden, default=1) < 1:
            raise ValueError(f"embedding_hidden must be at least 1, got {list(embedding_hidden)}")
        self.dim = dim
        self.num_leapfrogs = num_leapfrogs
        self.log_step_size = nn.Parameter(initial_log_step_size(num_leapfrogs, step_size))
        self.hidden = hidden
        self.head_scale = head_scale
        self.observation_dim = observation_dim
        self.embedding_hidden = tuple(embedding_hidden)
        self.position_network = UpdateNetwork(dim, hidden, head_scale)
        self.momentum_network = UpdateNetwork(dim, hidden, head_scale)
        self.embedding = (
            embedding_network([observation_dim, *embedding_hidden, hidden])
            if observation_dim is not None
            else None
        )
        self.register_buffer("mask", random_halves(num_leapfrogs, dim))
        self.register_buffer("times", time_encoding(num_leapfrogs), persistent=False)

    def embed(self, observations: Tensor) -> Context:
        """Return the embedding (B, hidden) of observations (B, N); None without an embedding."""
        return None if self.embedding is None else self.embedding(observations)

    def integrate(self, start: PhasePoint, energy: Energy, context: Context = None) -> Endpoint:
        """Take ``num_leapfrogs`` augmented leapfrogs, each chain in its own direction.

        Raises:
            ValueError: There is an embedding but no context, or a context but no embedding.
        """
        if context is None and self.embedding is not None:
            raise ValueError(
                "this kernel has an embedding: pass context=kernel.embed(observations); "
                "train_sampler takes kernels without one, built without observation_dim"
            )
        if context is not None and self.embedding is None:
            raise ValueError("this kernel was built without observation_dim and takes no context")
        state, momentum, direction = start
        if state.position.shape[-1] != self.dim:
            raise ValueError(
                f"this kernel is of {self.dim} dimensions, the chains of {state.position.shape[-1]}"
            )
        if self.is_compiled:
            # As those of the later leapfrogs are, or the compiler would compile them apart.
            state = state._replace(position=state.position.contiguous())
            if not momentum.requires_grad:
                momentum = momentum.detach().requires_grad_(torch.is_grad_enabled())
        forward = direction[:, None] > 0
        # One number a chain, each with its own gate, or a diverged chain would spoil ε for all.
        step_size = finite_gradient(self.step_size.to(momentum.dtype).expand(len(momentum), 1))
        log_determinant = torch.zeros_like(state.energy)
        for step in range(self.num_leapfrogs):
            reverse = self.num_leapfrogs - 1 - step
            time = torch.where(forward, self.times[step], self.times[reverse]).to(momentum)
            mask = torch.where(forward, self.mask[step], ~self.mask[reverse])
            point = PhasePoint(state, momentum, direction)
            state, momentum, change = self.compiled(_leapfrog)(
                self, point, energy, step_size, mask, time, context
            )
            log_determinant = log_determinant + change
        return Endpoint(state, momentum, log_determinant)


def _leapfrog(
    kernel: L2HMC,
    start: PhasePoint,
    energy: Energy,
    step_size: Tensor,
    mask: Tensor,
    time: Tensor,
    context: Context,
) -> tuple[State, Tensor, Tensor]:
    # A function of the kernel, not a bound method: a copied kernel must not use the original's
    # networks once this is compiled.
    def momentum_update(position: Tensor, gradient: Tensor) -> Update:
        return kernel.momentum_network(position, gradient, time, context)

    def position_update(fixed: Tensor, momentum: Tensor) -> Update:
        return kernel.position_network(fixed, momentum, time, context)

    return augmented_leapfrog(*start, energy, step_size, mask, momentum_update, position_update)


def time_encoding(num_leapfrogs: int) -> Tensor:
    """Return τ(t) = (cos 2πt/M, sin 2πt/M) for t = 0 … M - 1, (M, 2)."""
    angles = 2 * math.pi * torch.arange(num_leapfrogs) / num_leapfrogs
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def random_halves(num_leapfrogs: int, dim: int) -> Tensor:
    """Draw a random half of the coordinates for each leapfrog, boolean, (M, D)."""
    ranks = torch.rand(num_leapfrogs, dim).argsort(dim=-1)
    return ranks < dim // 2
