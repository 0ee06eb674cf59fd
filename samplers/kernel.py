"""The kernel contract: what every Markov chain Monte Carlo transition here takes and returns."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from samplers.compiling import Function, compiler, compiler_works
from samplers.energy import Energy, State, chosen, evaluated, finite_gradient, value_and_gradient
from samplers.random import standard_normal

DIVERGENCE_THRESHOLD = 1000.0
"""A rise of the energy beyond this many nats is a failed integration, not a bad proposal."""


Context = Any
"""What :meth:`Kernel.embed` returns: a tensor, a tuple of such, or None. Rows are chains."""


class Noise(NamedTuple):
    """All randomness of one Metropolis-Hastings step."""

    momentum: Tensor
    """v ~ N(0, I), (B, D)."""
    direction: Tensor
    """d, uniform on {-1, +1}, (B,); of HMC with jitter, times the share of ε that is taken."""
    uniform: Tensor
    """u ~ U[0, 1) for the acceptance decision, (B,)."""


class Info(NamedTuple):
    """What one step tells beside the new state: to log, to train on, and to throw away."""

    proposal: Tensor
    """The proposed positions, (B, D); the old position where the chain diverged."""
    acceptance: Tensor
    """The probability of acceptance, (B,)."""
    accepted: Tensor
    """Whether the proposal became the new position, (B,), boolean."""
    diverging: Tensor
    """Whether the integration failed, (B,), boolean."""


class PhasePoint(NamedTuple):
    """Where a trajectory starts."""

    state: State
    """Position, energy and gradient of the chains."""
    momentum: Tensor
    """v, (B, D)."""
    direction: Tensor
    """d, ±1, (B,)."""


class Endpoint(NamedTuple):
    """Where a trajectory ends, and what it did to volumes on its way."""

    state: State
    """Position, energy and gradient of the chains."""
    momentum: Tensor
    """v', (B, D)."""
    log_determinant: Tensor
    """log|det J| of the map from start to end, (B,) nats."""


class RoundTrip(NamedTuple):
    """What a trajectory and its way back leave, of which exact arithmetic would leave nothing."""

    position: Tensor
    """Where the way back ends minus where the trajectory began, (B, D)."""
    momentum: Tensor
    """The same of the momentum, (B, D)."""
    log_det: Tensor
    """Sum of the log-determinants of both ways, (B,) nats."""


class Kernel(nn.Module, ABC):
    """A Metropolis-Hastings transition that leaves exp(-U) invariant for any energy U.

    Subclasses implement :meth:`integrate`, a volume-tracking map of (position, momentum) that the
    opposite direction inverts; the rest of the contract is here, once.
    """

    num_leapfrogs: int

    log_step_size: Tensor
    """log ε, 0-d: a parameter where it is learned, a buffer where it is adapted; a buffer of shape
    (B, 1) is one for each chain."""

    step_is_one_region: bool = True
    """Whether :meth:`compile` compiles a step as a whole, or what its leapfrogs share."""

    steps_per_call: int = 1
    """Steps that :func:`samplers.sample` takes in a call; :meth:`compile` sets it."""

    _compiler: Callable[[Function], Function] | None = None

    @property
    def step_size(self) -> Tensor:
        """The step size ε of the leapfrog integrator, 0-d or (B, 1)."""
        return self.log_step_size.exp()

    @abstractmethod
    def integrate(self, start: PhasePoint, energy: Energy, context: Context = None) -> Endpoint:
        """Follow a trajectory to its end."""

    def embed(self, observations: Tensor) -> Context:
        """Return the context of :meth:`step` for observations (B, N), computed once a chain."""
        return None

    def init(self, position: Tensor, energy: Energy) -> State:
        """Return the state of chains at ``position`` (B, D): one gradient evaluation."""
        return value_and_gradient(energy, position)

    def noise(self, state: State, generator: torch.Generator | None = None) -> Noise:
        """Draw the randomness of one step."""
        like = state.position
        momentum = standard_normal(like, generator)
        coin, uniform = torch.rand(
            (2, len(like)), generator=generator, dtype=like.dtype, device=like.device
        )
        return Noise(momentum, torch.copysign(torch.ones_like(coin), coin - 0.5), uniform)

    def compile(self, steps: int = 1, **options: Any) -> None:
        """Compile the kernel at its next step, which takes a while, by ``torch.compile``.

        One compiled region is a step; of a kernel with networks it is a leapfrog, of a long
        trajectory without them ten. Steps of one shape and class of energy share a compilation;
        numbers that the energy holds must be tensors to change without a new one. A process keeps
        256, and the next one raises; ``torch.compiler.reset()`` forgets them all.
        Parameters, ``state_dict`` and draws stay as they are. What runs in a flow stays eager.

        Where the compiler does not work, the kernel stays as it is and a warning says so.

        Arguments:
            steps: That :func:`samplers.sample` compiles as one region where a step is one. On a
                small target, where calls take longer than the work, five or ten are faster than
                one, but as many times longer to compile.
            options: Of ``torch.compile``.

        Raises:
            ValueError: The number of steps is below 1.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        device = self.log_step_size.device.type
        if not ("backend" in options or compiler_works(device)):
            warnings.warn(
                "torch.compile does not work here (is there a C++ compiler?): chains run eagerly",
                stacklevel=2,
            )
            return
        compile_ = compiler(device, options)
        for each in self.modules():
            if isinstance(each, Kernel):
                each._compiler = compile_
        self.steps_per_call = steps if self.step_is_one_region else 1

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called, of this kernel and not of one it is a copy of."""
        return self._compiler is not None

    def compiled(self, function: Function) -> Function:
        """Return a function as compiled code, if the kernel is compiled, else as it is."""
        return function if self._compiler is None else self._compiler(function)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled code, which neither can be pickled nor is a copy's.

        A copy holds copies of the kernels inside, or they would be compiled together.
        """
        modules = {name: _apart(module) for name, module in self._modules.items()}
        state = {**super().__getstate__(), "_modules": modules, "_compiler": None}
        return {**state, "steps_per_call": 1}

    def step(
        self, state: State, energy: Energy, noise: Noise, context: Context = None
    ) -> tuple[State, Info]:
        r"""Propose and accept or reject: a pure function of its arguments.

        .. math:: A = \min\bigl(1, \exp(H(x, v) - H(x', v') + \log|\det J|)\bigr),
            \quad H(x, v) = U(x) + \tfrac{1}{2} v^\top v

        A chain whose start or end has a non-finite energy, gradient, position, momentum or
        log-determinant, or where H - log|det J| rises by more than 1000 nats, is flagged
        ``diverging``, has acceptance 0 and keeps its state.

        Arguments:
            state: Of this very energy, as returned by :meth:`init` or the last step.
            energy: U, from (B, D) to (B,).
            noise: As drawn by :meth:`noise`.
            context: As returned by :meth:`embed`, where it returns one.

        References:
            Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
            Sohl-Dickstein, 2018), Equation 5.
        """
        run = self.compiled(transition) if self.step_is_one_region else transition
        return run(self, state, energy, noise, context)

    def trajectory(
        self,
        position: Tensor,
        momentum: Tensor,
        direction: Tensor,
        energy: Energy,
        context: Context = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the end of the trajectory, its momentum and log|det J| (B,).

        The trajectory in direction -d from there leads back to where this one began.
        """
        state = self.init(position, energy)
        end = self.integrate(PhasePoint(state, momentum, direction), energy, context)
        return end.state.position, end.momentum, end.log_determinant

    @torch.no_grad()
    def round_trip(
        self, position: Tensor, energy: Energy, noise: Noise, context: Context = None
    ) -> RoundTrip:
        """Follow a trajectory and then, in the opposite direction, its way back.

        Detailed balance rests on both being inverse; a learned kernel whose scales have grown
        large can lose that to rounding.

        Arguments:
            position: Where the chains are, (B, D).
            energy: U, from (B, D) to (B,).
            noise: As drawn by :meth:`noise`.
            context: As returned by :meth:`embed`, where it returns one.
        """
        direction = noise.direction
        end, momentum, there = self.trajectory(position, noise.momentum, direction, energy, context)
        back, momentum, again = self.trajectory(end, momentum, -direction, energy, context)
        return RoundTrip(back - position, momentum - noise.momentum, there + again)


def _apart(module: nn.Module | None) -> nn.Module | None:
    """Return a module that shares everything but the kernels inside it, which are copies."""
    if module is None or not any(isinstance(each, Kernel) for each in module.modules()):
        return module
    alike = copy(module)
    if not isinstance(module, Kernel):
        alike._modules = {name: _apart(inside) for name, inside in module._modules.items()}
    return alike


def transition(
    kernel: Kernel, state: State, energy: Energy, noise: Noise, context: Context
) -> tuple[State, Info]:
    """Take a :meth:`Kernel.step`: a function of the kernel, which copies of it can share."""
    start = State(
        finite_gradient(state.position),
        finite_gradient(state.energy),
        finite_gradient(state.gradient),
        state.extra,
    )
    end, momentum, log_determinant = kernel.integrate(
        PhasePoint(start, noise.momentum, noise.direction), energy, context
    )
    # Zero times a finite number is 0, else NaN: one sum over coordinates, where a conjunction
    # of booleans would take as long as the trajectory of a small target.
    zero_if_finite = 0.0 * end.position.detach() + 0.0 * end.gradient.detach()
    kinetic = 0.5 * (noise.momentum.square() - momentum.square()) + zero_if_finite
    log_ratio = start.energy - end.energy + kinetic.sum(dim=-1) + log_determinant
    diverging = ~log_ratio.isfinite() | (log_ratio < -DIVERGENCE_THRESHOLD)
    acceptance = torch.where(diverging, -torch.inf, log_ratio).clamp(max=0.0).exp()
    accepted = noise.uniform < acceptance
    proposal = torch.where(diverging[:, None], start.position, end.position)
    return chosen(accepted, end, state), Info(proposal, acceptance, accepted, diverging)


def as_positions(position: Any, device: torch.device | None = None) -> Tensor:
    """Return where chains start, (B, D), as a tensor of torch's default type or of float64.

    Arguments:
        position: A tensor, or an array, which goes to the device.
        device: Where arrays go.

    Raises:
        ValueError: There are no (B, D).
    """
    if not (isinstance(position, Tensor) and position.dtype in (torch.float32, torch.float64)):
        device = position.device if isinstance(position, Tensor) else device
        position = torch.as_tensor(position, dtype=torch.get_default_dtype(), device=device)
    if position.dim() != 2 or position.numel() == 0:
        raise ValueError(
            f"chains start at positions of shape (chains, dim), got {tuple(position.shape)}: "
            "x[None] is one chain at x of shape (dim,)"
        )
    return position


@torch.no_grad()
def finite_start(kernel: Kernel, energy: Energy, position: Tensor) -> State:
    """Return the state of chains at ``position`` (B, D), after a check that each can leave it.

    Raises:
        ValueError: The positions are no (B, D), or the energy or its gradient is not finite at
            some of them. An energy that raises at all of them raises its own error.
    """
    position = as_positions(position, kernel.log_step_size.device)
    state = kernel.init(position, energy)
    finite = state.energy.isfinite() & state.gradient.isfinite().all(dim=-1)
    if not finite.any():
        evaluated(energy, position)
    if not finite.all():
        raise ValueError(
            "the energy or its gradient is not finite at the start of "
            f"{int((~finite).sum())} of the chains"
        )
    return state
