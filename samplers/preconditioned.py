"""A kernel in whitened coordinates: diagonal or dense mass for HMC, and the same for L2HMC."""

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from samplers.energy import Energy, State, value_and_gradient
from samplers.kernel import Context, Endpoint, Kernel, Noise, PhasePoint


class Coordinates(ABC):
    """An energy as a function of other coordinates w of x; both ways between them.

    A state at w carries what belongs to x in its ``extra``, so that the way back costs nothing.
    """

    @abstractmethod
    def value_and_gradient(self, position: Tensor) -> State:
        """Return the state at w (B, D): its energy is that of the density of w."""

    @abstractmethod
    def into(self, x: Tensor) -> Tensor:
        """Return w of x, (B, D)."""

    @abstractmethod
    def out_of(self, w: Tensor) -> Tensor:
        """Return x of w, (B, D)."""

    @abstractmethod
    def state_into(self, state: State) -> State:
        """Return the state at w of that at x, without an evaluation of the energy."""

    @abstractmethod
    def state_out_of(self, state: State) -> State:
        """Return the state at x of that at w, without an evaluation of the energy."""

    def integrate(self, kernel: Kernel, start: PhasePoint, context: Context) -> Endpoint:
        """Follow a kernel's trajectory in w; its log-determinant is that in w."""
        begin = start._replace(state=self.state_into(start.state))
        end = kernel.integrate(begin, self, context)
        return end._replace(state=self.state_out_of(end.state))


class Transformed(Kernel, ABC):
    """A kernel that runs in other coordinates than those of its energy.

    Arguments:
        kernel: What moves in them.
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.num_leapfrogs = kernel.num_leapfrogs

    @property
    def log_step_size(self) -> Tensor:  # type: ignore[override]
        """Log ε, in the coordinates w."""
        return self.kernel.log_step_size

    @property
    def step_is_one_region(self) -> bool:  # type: ignore[override]
        """As of the kernel inside; else the way into its coordinates and back stays eager."""
        return self.kernel.step_is_one_region

    def embed(self, observations: Tensor) -> Context:
        """Return the context of the kernel inside."""
        return self.kernel.embed(observations)

    @abstractmethod
    def coordinates(self, energy: Energy, context: Context = None) -> Coordinates:
        """Return the energy in the coordinates in which the kernel inside runs."""

    def noise(self, state: State, generator: torch.Generator | None = None) -> Noise:
        """Draw the randomness of one step of the kernel inside."""
        return self.kernel.noise(state, generator)

    def integrate(self, start: PhasePoint, energy: Energy, context: Context = None) -> Endpoint:
        """Follow the kernel's trajectory in w; volumes there are those in x up to a constant."""
        return self.coordinates(energy, context).integrate(self.kernel, start, context)


class Preconditioned(Transformed):
    r"""Any kernel, run in the coordinates w = L⁻¹(x - μ).

    For HMC, x = μ + L w makes momenta N(0, I) in w what momenta with the mass matrix (L Lᵀ)⁻¹ are
    in x: with L Lᵀ the covariance of the target, all directions are equally wide. A learned kernel
    sees a target whose location and widths are gone.

    Arguments:
        kernel: What moves in w.
        location: μ, (D,).
        factor: L: standard deviations (D,), or a lower triangular matrix (D, D).

    Raises:
        ValueError: The shapes do not fit, L is not lower triangular, or one of its diagonal
            elements is not positive.

    References:
        MCMC using Hamiltonian dynamics (Neal, 2011), Section 4.1.
    """

    location: Tensor
    factor: Tensor

    def __init__(self, kernel: Kernel, location: Tensor, factor: Tensor) -> None:
        super().__init__(kernel)
        dim = len(location)
        if factor.shape not in ((dim,), (dim, dim)):
            raise ValueError(
                f"the factor must have shape ({dim},) or ({dim}, {dim}), got {tuple(factor.shape)}"
            )
        diagonal = factor if factor.dim() == 1 else factor.diagonal()
        if not (diagonal > 0).all():
            raise ValueError("the diagonal of the factor must be positive")
        if factor.dim() == 2 and not torch.equal(factor, factor.tril()):
            raise ValueError(
                "the factor must be lower triangular: torch.linalg.cholesky(covariance)"
            )
        self.register_buffer("location", location.clone())
        self.register_buffer("factor", factor.clone())

    def with_kernel(self, kernel: Kernel) -> "Preconditioned":
        """Return another kernel in these same coordinates."""
        return Preconditioned(kernel, self.location, self.factor)

    def coordinates(self, energy: Energy, context: Context = None) -> "Whitened":
        """Return the energy as a function of w."""
        return Whitened(energy, Affine(self.location, self.factor))


class Whitening(Protocol):
    """The map x = μ + L w."""

    def whiten(self, x: Tensor, /) -> Tensor:
        """Return w = L⁻¹(x - μ)."""

    def colour(self, w: Tensor, /) -> Tensor:
        """Return x = μ + L w."""

    def pull(self, gradient: Tensor, /) -> Tensor:
        """Return the gradient in w, Lᵀ times that in x."""


class Affine(NamedTuple):
    """x = μ + L w, the same for all chains; L is lower triangular, or its diagonal."""

    location: Tensor
    """μ, (D,)."""
    factor: Tensor
    """L, (D, D) or (D,)."""

    def whiten(self, x: Tensor) -> Tensor:
        """Return w = L⁻¹(x - μ)."""
        location, factor = self._as(x)
        centred = x - location
        if factor.dim() == 1:
            return centred / factor
        return torch.linalg.solve_triangular(factor.T, centred, upper=True, left=False)

    def colour(self, w: Tensor) -> Tensor:
        """Return x = μ + L w."""
        location, factor = self._as(w)
        return location + (w * factor if factor.dim() == 1 else w @ factor.T)

    def pull(self, gradient: Tensor) -> Tensor:
        """Return the gradient in w, Lᵀ times that in x."""
        _, factor = self._as(gradient)
        return gradient * factor if factor.dim() == 1 else gradient @ factor

    def _as(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return μ and L in the precision of the chains."""
        return self.location.to(like.dtype), self.factor.to(like.dtype)


class Whitened(Coordinates):
    """U as a function of w = L⁻¹(x - μ), with the gradient in x beside that in w."""

    def __init__(self, energy: Energy, whitening: Whitening) -> None:
        self.energy = energy
        self.whitening = whitening

    def value_and_gradient(self, position: Tensor) -> State:
        """Return U and its gradient in w."""
        return self._at(position, value_and_gradient(self.energy, self.out_of(position)))

    def into(self, x: Tensor) -> Tensor:
        """Return w = L⁻¹(x - μ)."""
        return self.whitening.whiten(x)

    def out_of(self, w: Tensor) -> Tensor:
        """Return x = μ + L w."""
        return self.whitening.colour(w)

    def state_into(self, state: State) -> State:
        """Return the state at w of that at x."""
        return self._at(self.into(state.position), state)

    def state_out_of(self, state: State) -> State:
        """Return the state at x of that at w."""
        gradient, *extra = state.extra
        return State(self.out_of(state.position), state.energy, gradient, tuple(extra))

    def _at(self, w: Tensor, there: State) -> State:
        gradient = self.whitening.pull(there.gradient)
        return State(w, there.energy, gradient, (there.gradient, *there.extra))
