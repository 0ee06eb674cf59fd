"""A kernel in the coordinates of a normalizing flow, and independent proposals there."""

from copy import copy

import torch
import zuko
from torch import Tensor, nn

from samplers.energy import Energy, State, value_and_gradient
from samplers.kernel import Context, Endpoint, Kernel, PhasePoint
from samplers.preconditioned import Affine, Coordinates, Transformed

INVERSE_TOLERANCE = 1e-2
"""Largest error of the way into a flow's coordinates and back, in standard deviations."""

_BATCH = 256
_HELD_OUT = 0.1


class Flow(Transformed):
    r"""Any kernel, run in the coordinates w of x = μ + L f(w), f a RealNVP.

    The density of w is that of x times |∂x/∂w|, so that the kernel's log-determinant is

    .. math:: \log|\det J| + \log|∂x/∂w|_{\text{end}} - \log|∂x/∂w|_{\text{start}}

    A trajectory at whose start or end the way into the coordinates and back is off by more than a
    hundredth of a standard deviation is rejected, in either direction: rounding cannot bias the
    draws by more.

    Arguments:
        kernel: What moves in w.
        location: μ, (D,), D at least 2.
        factor: L, lower triangular, (D, D).
        num_couplings: Affine coupling layers of f.
        hidden: Units in each of the two hidden layers of a coupling.

    Raises:
        ValueError: The shapes do not fit.

    References:
        Density estimation using Real NVP (Dinh, Sohl-Dickstein and Bengio, 2017).
        NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport (Hoffman,
        Sountsov, Dillon, Langmore, Tran and Vasudevan, 2019).
    """

    location: Tensor
    factor: Tensor
    step_is_one_region = False  # the compiler does not take a flow

    def __init__(
        self,
        kernel: Kernel,
        location: Tensor,
        factor: Tensor,
        num_couplings: int = 6,
        hidden: int = 64,
    ) -> None:
        super().__init__(kernel)
        dim = len(location)
        if dim < 2 or factor.shape != (dim, dim):
            raise ValueError(
                f"a flow needs a location (D,), D at least 2, and a factor (D, D), got "
                f"{tuple(location.shape)} and {tuple(factor.shape)}"
            )
        self.num_couplings = num_couplings
        self.hidden = hidden
        self.register_buffer("location", location.clone())
        self.register_buffer("factor", factor.clone())
        # Smooth, as its derivatives are forces.
        self.flow = zuko.flows.RealNVP(
            dim, transforms=num_couplings, hidden_features=(hidden, hidden), activation=nn.Tanh
        )

    def with_kernel(self, kernel: Kernel) -> "Flow":
        """Return another kernel in these same coordinates, which both share."""
        other = Flow(kernel, self.location, self.factor, self.num_couplings, self.hidden)
        other.flow = self.flow
        return other.to(self.location.device)

    def coordinates(self, energy: Energy, context: Context = None) -> "FlowCoordinates":
        """Return the energy as a function of w."""
        return FlowCoordinates(energy, self)

    def inverse_error(self, x: Tensor) -> Tensor:
        """Return how far the way into the coordinates and back is off, in deviations, (B,)."""
        coordinates = self.coordinates(torch.zeros_like)
        found = coordinates.out_of(coordinates.into(x))
        return Affine(x, self.factor).whiten(found).abs().amax(dim=-1)

    def integrate(self, start: PhasePoint, energy: Energy, context: Context = None) -> Endpoint:
        """Follow the kernel's trajectory in w."""
        if torch.is_inference_mode_enabled():  # where the flow could not be differentiated
            with torch.inference_mode(False), torch.no_grad():
                position, potential, gradient = (part.clone() for part in start.state[:3])
                extra = tuple(part.clone() for part in start.state.extra)
                state = State(position, potential, gradient, extra)
                point = PhasePoint(state, start.momentum.clone(), start.direction.clone())
                return self.integrate(point, energy, context)
        coordinates = self.coordinates(energy)
        begin = coordinates.state_into(start.state)
        eager = copy(self.kernel)  # not compiled, whatever the kernel is
        end = eager.integrate(start._replace(state=begin), coordinates, context)
        log_volume = coordinates.log_volume(end.state) - coordinates.log_volume(begin)
        state = coordinates.state_out_of(end.state)
        there, back = self.inverse_error(start.state.position), self.inverse_error(state.position)
        exact = torch.maximum(there, back) < INVERSE_TOLERANCE
        log_determinant = torch.where(exact, end.log_determinant + log_volume, torch.nan)
        return Endpoint(state, end.momentum, log_determinant)


class FlowCoordinates(Coordinates):
    """U(x(w)) - log|∂x/∂w|; beside it, in ``extra``, the state at x and log|∂x/∂w|."""

    def __init__(self, energy: Energy, flow: Flow) -> None:
        self.energy = energy
        self.affine = Affine(flow.location, flow.factor)
        self.transform = flow.flow().transform
        self.log_scale = flow.factor.diagonal().log().sum()

    def value_and_gradient(self, position: Tensor) -> State:
        """Return the state at w (B, D)."""
        differentiable = torch.is_grad_enabled() and position.requires_grad
        with torch.enable_grad():
            leaf = position if differentiable else position.detach().requires_grad_()
            x, log_volume = self._out_of(leaf)
            there = value_and_gradient(self.energy, x if differentiable else x.detach())
            return self._state(leaf, x, log_volume, there, differentiable)

    def state_into(self, state: State) -> State:
        """Return the state at w of that at x."""
        with torch.enable_grad():
            leaf = self.into(state.position).requires_grad_()
            x, log_volume = self._out_of(leaf)
            return self._state(leaf, x, log_volume, state, False)

    def state_out_of(self, state: State) -> State:
        """Return the state at x of that at w."""
        position, energy, gradient, _, *extra = state.extra
        return State(position, energy, gradient, tuple(extra))

    def log_volume(self, state: State) -> Tensor:
        """Return log|∂x/∂w| at the state at w, (B,)."""
        return state.extra[3]

    def _state(
        self, w: Tensor, x: Tensor, log_volume: Tensor, there: State, differentiable: bool
    ) -> State:
        total = (x * there.gradient).sum() - log_volume.sum()
        if differentiable:  # ∂U(x)ᵀ ∂x/∂w: of U itself, which autograd can differentiate again
            total = there.energy.sum() - log_volume.sum()
        (gradient,) = torch.autograd.grad(total, w, create_graph=differentiable)
        energy = there.energy
        if not differentiable:
            w, x, log_volume = w.detach(), x.detach(), log_volume.detach()
        extra = x, energy, there.gradient, log_volume, *there.extra
        return State(w, energy - log_volume, gradient, extra)

    def into(self, x: Tensor) -> Tensor:
        """Return w of x, (B, D)."""
        return self.transform(self.affine.whiten(x)).detach()

    def out_of(self, w: Tensor) -> Tensor:
        """Return x of w, (B, D)."""
        return self._out_of(w)[0].detach()

    def _out_of(self, w: Tensor) -> tuple[Tensor, Tensor]:
        y, log_volume = self.transform.inv.call_and_ladj(w)
        return self.affine.colour(y), log_volume + self.log_scale


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


def fit_flow(
    flow: Flow,
    draws: Tensor,
    num_iterations: int = 1500,
    *,
    learning_rate: float = 2e-3,
    generator: torch.Generator | None = None,
) -> float:
    r"""Fit a flow to draws by maximum likelihood; return what it gains on held-out ones.

    .. math:: E \log q(x) - E \log N(x; μ, L L^\top)

    in nats, over a tenth of the draws that the fit has not seen: not above 0 where the Gaussian
    is all that there is to say. Adam, with a rate that falls as a cosine.

    Arguments:
        flow: Its coordinates are fitted in place, from the location and factor that it has.
        draws: Of the target, (N, D).
        num_iterations: Updates, of 256 draws each.
        learning_rate: Adam's.
        generator: Of the order of the draws.
    """
    y = Affine(flow.location, flow.factor).whiten(draws)
    order = torch.randperm(len(y), generator=generator, device=y.device)
    kept = max(1, int(_HELD_OUT * len(y)))
    held_out, y = y[order[:kept]], y[order[kept:]]
    parameters = [each.requires_grad_() for each in flow.flow.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_iterations)
    with torch.enable_grad():
        for _ in range(num_iterations):
            rows = torch.randint(len(y), (_BATCH,), generator=generator, device=y.device)
            loss = -flow.flow().log_prob(y[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    for each in parameters:  # a kernel inside is trained, its coordinates are not
        each.requires_grad_(False)
    with torch.no_grad():
        gaussian = torch.distributions.Normal(0.0, 1.0).log_prob(held_out).sum(dim=-1)
        return float((flow.flow().log_prob(held_out) - gaussian).mean())
