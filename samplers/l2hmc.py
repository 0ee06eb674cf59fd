"""Learned Hamiltonian Monte Carlo (L2HMC): the kernel, its leapfrog and its networks."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from samplers.energy import Energy, State, finite_gradient, value_and_gradient
from samplers.hmc import initial_log_step_size
from samplers.kernel import Context, Endpoint, Kernel, PhasePoint

_LARGEST_INPUT = 1e30
_EMBEDDING_HIDDEN = (512, 512)


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
        embedding_hidden: Sequence[int] = _EMBEDDING_HIDDEN,
    ) -> None:
        super().__init__()
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim and hidden must be at least 1, got {dim} and {hidden}")
        if min(embedding_hidden, default=1) < 1:
            raise ValueError(f"embedding_hidden must be at least 1, got {list(embedding_hidden)}")
        if observation_dim is None and tuple(embedding_hidden) != _EMBEDDING_HIDDEN:
            raise ValueError(
                "embedding_hidden is of the embedding of observations: give observation_dim, too"
            )
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


class Update(NamedTuple):
    """S, T and Q at one point of the trajectory, each (B, D)."""

    scale: Tensor
    """S: log-scale of the variable that is updated, per unit of step size."""
    translation: Tensor
    """T: added to the gradient or to the velocity."""
    gate: Tensor
    """Q: log-scale of the gradient or of the momentum, per unit of step size."""


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


class UpdateNetwork(nn.Module):
    r"""S, T and Q on a shared trunk.

    .. math::
        h &= \mathrm{relu}(W_2\, \mathrm{relu}(W_1 (a, b, τ) + c)), \\
        S &= e^{λ_S} \tanh(W_S h), \quad T = W_T h, \quad Q = e^{λ_Q} \tanh(W_Q h)

    The three heads start near zero, so that training starts at Hamiltonian Monte Carlo.

    Arguments:
        dim: D, coordinates of the position.
        hidden: Units in each of the two hidden layers, and length of the context.
        head_scale: Factor on the initial weights of the heads.

    References:
        Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
        Sohl-Dickstein, 2018), Appendix B.
    """

    def __init__(self, dim: int, hidden: int, head_scale: float) -> None:
        super().__init__()
        self.inputs = nn.Linear(2 * dim + 2, hidden)
        self.trunk = nn.Linear(hidden, hidden)
        self.heads = nn.Linear(hidden, 3 * dim)
        self.log_amplitude = nn.Parameter(torch.zeros(2 * dim))
        with torch.no_grad():
            self.heads.weight.mul_(head_scale)
            self.heads.bias.zero_()

    def forward(
        self, first: Tensor, second: Tensor, time: Tensor, context: Tensor | None
    ) -> Update:
        """Return S, T and Q, each (B, D).

        Arguments:
            first: a, (B, D).
            second: b, (B, D).
            time: τ, (B, 2).
            context: c, (B, hidden), or None.
        """
        # Weight gradients are sums over chains of input times gradient: one diverged chain
        # must bring neither a non-finite input, nor one so large that the hidden layers
        # overflow, nor a non-finite gradient into them.
        inputs = torch.cat([first, second, time], dim=-1).nan_to_num(0.0, 0.0, 0.0)
        inputs = inputs.clamp(-_LARGEST_INPUT, _LARGEST_INPUT)
        features = self.inputs(inputs.to(self.inputs.weight.dtype))
        if context is not None:
            features = features + context
        heads = self.heads(torch.relu(self.trunk(torch.relu(features))))
        heads = heads.to(first.dtype)  # chains keep their precision, whatever the networks'
        bounded, translation = heads.split(self.log_amplitude.numel(), dim=-1)
        bounded = finite_gradient(self.log_amplitude.exp().to(first.dtype) * torch.tanh(bounded))
        scale, gate = bounded.chunk(2, dim=-1)
        return Update(scale, finite_gradient(translation), gate)


def embedding_network(sizes: Sequence[int]) -> nn.Sequential:
    """Return a softplus network with the given layer sizes, linear at its end."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.Softplus()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def time_encoding(num_leapfrogs: int) -> Tensor:
    """Return τ(t) = (cos 2πt/M, sin 2πt/M) for t = 0 … M - 1, (M, 2)."""
    angles = 2 * math.pi * torch.arange(num_leapfrogs) / num_leapfrogs
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def random_halves(num_leapfrogs: int, dim: int) -> Tensor:
    """Draw a random half of the coordinates for each leapfrog, boolean, (M, D)."""
    ranks = torch.rand(num_leapfrogs, dim).argsort(dim=-1)
    return ranks < dim // 2
