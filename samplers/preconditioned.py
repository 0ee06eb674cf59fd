"""A kernel in whitened coordinates: diagonal or dense mass for HMC, and the same for L2HMC."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from samplers.energy import Energy, State, value_and_gradient
from samplers.kernel import Context, Kernel


class Coordinates(ABC):
    """An energy as a function of other coordinates w of x; both ways between them."""

    @abstractmethod
    def value_and_gradient(self, position: Tensor) -> State:
        """Return the state at w (B, D): its energy is that of the density of w."""

    @abstractmethod
    def into(self, x: Tensor) -> Tensor:
        """Return w of x, (B, D)."""

    @abstractmethod
    def out_of(self, w: Tensor) -> Tensor:
        """Return x of w, (B, D)."""


class Transformed(Kernel, ABC):
    """A kernel that runs in other coordinates than those of its energy."""

    kernel: Kernel

    @abstractmethod
    def coordinates(self, energy: Energy) -> Coordinates:
        """Return the energy in the coordinates in which the kernel inside runs."""


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
        super().__init__()
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
        self.kernel = kernel
        self.num_leapfrogs = kernel.num_leapfrogs
        self.register_buffer("location", location.clone())
        self.register_buffer("factor", factor.clone())

    def with_kernel(self, kernel: Kernel) -> "Preconditioned":
        """Return another kernel in these same coordinates."""
        return Preconditioned(kernel, self.location, self.factor)

    def coordinates(self, energy: Energy) -> "Whitened":
        """Return the energy as a function of w."""
        return Whitened(energy, self.location, self.factor)

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

    def integrate(
        self,
        state: State,
        momentum: Tensor,
        direction: Tensor,
        energy: Energy,
        context: Context = None,
    ) -> tuple[State, Tensor, Tensor]:
        """Follow the kernel's trajectory in w; volumes there are those in x up to a constant."""
        whitened = self.coordinates(energy)
        start = State(
            whitened.into(state.position), state.energy, whitened.pull(state.gradient), state.extra
        )
        end, momentum, log_determinant = self.kernel.integrate(
            start, momentum, direction, whitened, context
        )
        gradient = whitened.push(end.gradient)
        state = State(whitened.out_of(end.position), end.energy, gradient, end.extra)
        return state, momentum, log_determinant


class Whitened(Coordinates):
    """U as a function of w = L⁻¹(x - μ)."""

    def __init__(self, energy: Energy, location: Tensor, factor: Tensor) -> None:
        self.energy = energy
        self.location = location
        self.factor = factor

    def value_and_gradient(self, position: Tensor) -> State:
        """Return U and its gradient in w."""
        state = value_and_gradient(self.energy, self.out_of(position))
        return State(position, state.energy, self.pull(state.gradient), state.extra)

    def into(self, x: Tensor) -> Tensor:
        """Return w = L⁻¹(x - μ)."""
        return whitened(x, self.location, self.factor)

    def out_of(self, w: Tensor) -> Tensor:
        """Return x = μ + L w."""
        return self.location + (w * self.factor if self.factor.dim() == 1 else w @ self.factor.T)

    def pull(self, gradient: Tensor) -> Tensor:
        """Return the gradient in w, Lᵀ ∂U."""
        return gradient * self.factor if self.factor.dim() == 1 else gradient @ self.factor

    def push(self, gradient: Tensor) -> Tensor:
        """Return the gradient in x, L⁻ᵀ of that in w."""
        if self.factor.dim() == 1:
            return gradient / self.factor
        solved = torch.linalg.solve_triangular(self.factor, gradient, upper=False, left=False)
        # Its columns are contiguous, a first state's rows: steps would be compiled for either.
        return solved.contiguous()


def whitened(x: Tensor, location: Tensor, factor: Tensor) -> Tensor:
    """Return L⁻¹(x - μ) of points (B, D), L as in :class:`Preconditioned`."""
    centred = x - location
    if factor.dim() == 1:
        return centred / factor
    return torch.linalg.solve_triangular(factor.T, centred, upper=True, left=False)
