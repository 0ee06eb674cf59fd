"""The kernel contract: what every Markov chain Monte Carlo transition here takes and returns."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from samplers.energy import Energy, State, finite_gradient, value_and_gradient
from samplers.products import onednn_is_faster

DIVERGENCE_THRESHOLD = 1000.0
"""A rise of the energy beyond this many nats is a failed integration, not a bad proposal."""

_INDUCTOR = {"realize_reads_threshold": 1, "realize_opcount_threshold": 4}
# Otherwise the compiler inlines the recurrence of elementwise energies, and takes minutes.
_COMPILATIONS = 256
# Of a function that the compiler keeps: its own 8 are soon spent on batch sizes and kernels.


@cache
def compiler_works(device: str) -> bool:
    """Try whether ``torch.compile`` works on a type of device; it takes seconds the first time."""
    try:
        torch.compile(torch.exp, fullgraph=True)(torch.zeros(8, device=device))
    except Exception:  # what is missing decides what is raised: compiler, headers, Triton
        return False
    return True


def compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Return a function compiled by ``torch.compile``, for 256 shapes and kernels rather than 8."""
    with_room = torch._dynamo.config.patch(recompile_limit=_COMPILATIONS)
    return with_room(torch.compile(function, **options))


def _inductor_options(device: str) -> dict[str, Any]:
    if not onednn_is_faster(device):
        return _INDUCTOR
    from samplers.graph_pass import PRODUCTS_BY_ONEDNN  # which loads the compiler

    return {**_INDUCTOR, "post_grad_custom_pre_pass": PRODUCTS_BY_ONEDNN}


Context = Any
"""What :meth:`Kernel.embed` returns: a tensor, a tuple of such, or None. Rows are chains."""


class Noise(NamedTuple):
    """All randomness of one Metropolis-Hastings step."""

    momentum: Tensor
    """v ~ N(0, I), (B, D)."""
    direction: Tensor
    """d, uniform on {-1, +1}, (B,)."""
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


class Kernel(nn.Module, ABC):
    """A Metropolis-Hastings transition that leaves exp(-U) invariant for any energy U.

    Subclasses implement :meth:`integrate`, a volume-tracking map of (position, momentum) that the
    opposite direction inverts; the rest of the contract is here, once.
    """

    num_leapfrogs: int

    log_step_size: Tensor
    """log ε: a parameter where it is learned, a buffer where it is adapted."""

    steps_per_call: int = 1
    """Steps that :func:`samplers.sample` takes in a call; :meth:`compile` sets it."""

    @property
    def step_size(self) -> Tensor:
        """The step size ε of the leapfrog integrator, a 0-d tensor."""
        return self.log_step_size.exp()

    @abstractmethod
    def integrate(
        self,
        state: State,
        momentum: Tensor,
        direction: Tensor,
        energy: Energy,
        context: Context = None,
    ) -> tuple[State, Tensor, Tensor]:
        """Follow a trajectory from ``state``; return its end, the momentum and log|det J| (B,)."""

    def embed(self, observations: Tensor) -> Context:
        """Return the context of :meth:`step` for observations (B, N), computed once a chain."""
        return None

    def init(self, position: Tensor, energy: Energy) -> State:
        """Return the state of chains at ``position`` (B, D): one gradient evaluation."""
        return value_and_gradient(energy, position)

    def noise(self, state: State, generator: torch.Generator | None = None) -> Noise:
        """Draw the randomness of one step."""
        return _drawn(state.position, state.position.shape, generator)

    def noises(
        self, state: State, count: int, generator: torch.Generator | None = None
    ) -> list[Noise]:
        """Draw the randomness of several steps together, faster than that of one after another.

        They are other numbers than :meth:`noise` would draw: all momenta come first.
        """
        drawn = _drawn(state.position, (count, *state.position.shape), generator)
        return [Noise(*parts) for parts in zip(*(field.unbind() for field in drawn), strict=True)]

    def forward(
        self,
        state: State,
        energy: Energy,
        noises: Sequence[Noise],
        context: Context = None,
    ) -> list[tuple[State, Info]]:
        """Take one :meth:`step` for each noise, in one call that :meth:`compile` can speed up.

        Returns:
            What each step returned: the last one's state is where the chains are.
        """
        steps = []
        for noise in noises:
            state, info = self.step(state, energy, noise, context)
            steps.append((state, info))
        return steps

    def compile(self, steps: int = 1, **options: Any) -> None:
        """Compile the kernel at its next call, which takes a while, by ``torch.compile``.

        One compiled region is :meth:`forward`, or what :meth:`compile_leapfrog` compiles instead: a
        leapfrog with networks, ten of a long trajectory without. Calls of one shape, number of
        steps and class of energy share a compilation; numbers that the energy holds must be
        tensors to change without a new one. A process keeps 256, and the next one raises;
        ``torch.compiler.reset()`` forgets them all.
        Parameters and ``state_dict`` stay as they are.

        Where the compiler does not work, the kernel stays as it is and a warning says so.

        Arguments:
            steps: That :func:`samplers.sample` takes in one call from now on. On a small target,
                where calls take longer than the work, five or ten are faster than one, but as many
                times longer to compile, unless it is a leapfrog that is compiled. The draws depend
                on it: it changes the order of the noise.
            options: Of ``torch.compile``.

        Raises:
            ValueError: The number of steps is below 1.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps_per_call = steps
        device = self.log_step_size.device.type
        if not ("backend" in options or compiler_works(device)):
            warnings.warn(
                "torch.compile does not work here (is there a C++ compiler?): chains run eagerly",
                stacklevel=2,
            )
            return
        if not options.keys() & {"backend", "mode", "options"}:
            options["options"] = _inductor_options(device)
        options = {"fullgraph": True, "dynamic": False} | options
        if not self.compile_leapfrog(options):
            self._compiled_call_impl = compiled(self._call_impl, options)

    def compile_leapfrog(self, options: dict[str, Any]) -> bool:
        """Compile what leapfrogs share, with options of ``torch.compile``; say whether it was.

        Not so here: a leapfrog without networks is little, and those of a step are faster as one.
        """
        return False

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
        start = State(
            finite_gradient(state.position),
            finite_gradient(state.energy),
            finite_gradient(state.gradient),
            state.extra,
        )
        end, momentum, log_determinant = self.integrate(
            start, noise.momentum, noise.direction, energy, context
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
        kept = State(
            torch.where(accepted[:, None], end.position, state.position),
            torch.where(accepted, end.energy, state.energy),
            torch.where(accepted[:, None], end.gradient, state.gradient),
            tuple(_choose(accepted, *pair) for pair in zip(end.extra, state.extra, strict=True)),
        )
        return kept, Info(proposal, acceptance, accepted, diverging)

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
        end, momentum, log_determinant = self.integrate(state, momentum, direction, energy, context)
        return end.position, momentum, log_determinant


@torch.no_grad()
def finite_start(kernel: Kernel, energy: Energy, position: Tensor) -> State:
    """Return the state of chains at ``position`` (B, D), after a check that each can leave it.

    Raises:
        ValueError: The energy or its gradient is not finite at some of the positions.
    """
    state = kernel.init(position, energy)
    finite = state.energy.isfinite() & state.gradient.isfinite().all(dim=-1)
    if not finite.all():
        raise ValueError(
            "the energy or its gradient is not finite at the start of "
            f"{int((~finite).sum())} of the chains"
        )
    return state


def _drawn(like: Tensor, shape: Sequence[int], generator: torch.Generator | None) -> Noise:
    """Return noise of momenta of a shape (…, B, D), of the type and on the device of a tensor."""
    momentum = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    coin, uniform = torch.rand(
        (2, *shape[:-1]), generator=generator, dtype=like.dtype, device=like.device
    )
    return Noise(momentum, torch.copysign(torch.ones_like(coin), coin - 0.5), uniform)


def _choose(accepted: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(accepted.reshape(-1, *[1] * (new.dim() - 1)), new, old)
