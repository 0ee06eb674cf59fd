"""Targets with known answers: those of the paper and its released code, a funnel, a banana."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from samplers.random import standard_normal


class Target(nn.Module, ABC):
    """A density whose moments are known and that can be drawn from exactly.

    A target is called as an energy: ``target(x)`` is U(x) = -log p(x) + constant in nats, from
    (B, D) to (B,), in the type and on the device of x. ``target.to(device)`` spares a GPU the copy
    of its constants at every call.

    Arguments:
        mean: E x, (D,).
        covariance: Cov x, (D, D).
    """

    mean: Tensor
    """E x, (D,), float64 unless converted."""
    covariance: Tensor
    """Cov x, (D, D), float64 unless converted."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("covariance", covariance)

    @property
    def dim(self) -> int:
        """D, the coordinates of a point."""
        return len(self.mean)

    @abstractmethod
    def forward(self, position: Tensor) -> Tensor:
        """Return U at positions (B, D), in nats, (B,)."""

    @abstractmethod
    def _draw(self, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        """Turn standard normal numbers (B, D) into exact draws."""

    @torch.no_grad()
    def sample(
        self,
        count: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return independent exact draws, (count, D).

        Arguments:
            count: How many.
            generator: Of the draws, which are made on its device; without one, torch's own and
                the device of the target.
            dtype: Of the draws; without one, torch's default.
        """
        device = self.mean.device if generator is None else generator.device
        like = torch.empty(count, self.dim, dtype=dtype, device=device)
        return self._draw(standard_normal(like, generator), generator)


class GaussianTarget(Target):
    r"""A multivariate normal distribution.

    .. math:: U(x) = \tfrac{1}{2} (x - μ)^\top Σ^{-1} (x - μ)

    Arguments:
        mean: μ, (D,).
        covariance: Σ, (D, D).

    Raises:
        ValueError: Σ is not symmetric and positive definite.
    """

    whitening: Tensor
    coloring: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        mean, covariance = mean.double(), covariance.double()
        super().__init__(mean, covariance)
        variances, axes = torch.linalg.eigh(covariance)
        if not torch.allclose(covariance, covariance.mT) or variances.min() <= 0:
            raise ValueError("the covariance must be symmetric and positive definite")
        self.register_buffer("whitening", axes / variances.sqrt())
        self.register_buffer("coloring", (axes * variances.sqrt()).mT)

    def forward(self, position: Tensor) -> Tensor:
        """Return U at positions (B, D), in nats, (B,)."""
        white = (position - self.mean.to(position)) @ self.whitening.to(position)
        return 0.5 * white.square().sum(dim=-1)

    def _draw(self, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.mean.to(noise) + noise @ self.coloring.to(noise)


class GaussianMixture(Target):
    r"""A mixture of isotropic normal distributions.

    .. math:: U(x) = -\log \sum_k w_k σ_k^{-D} \exp\bigl(-‖x - μ_k‖^2 / 2σ_k^2\bigr)

    Arguments:
        centres: μ, (K, D).
        variances: σ², (K,).
        weights: w, (K,), of sum one; equal ones where not given.

    Raises:
        ValueError: A variance or weight is not positive, or the weights do not sum to one.
    """

    centres: Tensor
    variances: Tensor
    weights: Tensor

    def __init__(
        self,
        centres: Tensor | Sequence[Sequence[float]],
        variances: Tensor | Sequence[float],
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        centres = torch.as_tensor(centres, dtype=torch.float64)
        variances = torch.as_tensor(variances, dtype=torch.float64)
        equal = torch.full_like(variances, 1 / len(variances))
        weights = equal if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if variances.min() <= 0 or weights.min() <= 0 or abs(weights.sum() - 1) > 1e-6:
            raise ValueError("variances and weights must be positive, and the weights sum to one")
        mean = weights @ centres
        deviations = centres - mean
        between = (weights[:, None] * deviations).mT @ deviations
        super().__init__(mean, between + (weights @ variances) * torch.eye(len(mean)).to(mean))
        self.register_buffer("centres", centres)
        self.register_buffer("variances", variances)
        self.register_buffer("weights", weights)

    def forward(self, position: Tensor) -> Tensor:
        """Return U at positions (B, D), in nats, (B,)."""
        parts = self._log_parts(position)
        # Far away the parts are large, and the logarithm of a sum of exponentials near them is
        # rounded so that the weights in its gradient no longer sum to one: take it near zero.
        largest = parts.detach().amax(dim=-1, keepdim=True)
        return -((parts - largest).logsumexp(dim=-1) + largest[:, 0])

    def responsibilities(self, position: Tensor) -> Tensor:
        """Return p(k | x), the probabilities of the components given x, (B, K).

        Their mean over exact draws is the weights.
        """
        return self._log_parts(position).softmax(dim=-1)

    def _log_parts(self, position: Tensor) -> Tensor:
        variances, weights = self.variances.to(position), self.weights.to(position)
        squared = (position[:, None] - self.centres.to(position)).square().sum(dim=-1)
        return weights.log() - 0.5 * (self.dim * variances.log() + squared / variances)

    def _draw(self, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        weights = self.weights.to(noise)
        chosen = weights.multinomial(len(noise), replacement=True, generator=generator)
        scales = self.variances.to(noise).sqrt()[chosen]
        return self.centres.to(noise)[chosen] + scales[:, None] * noise


class RoughWell(Target):
    r"""A standard normal distribution with a fine ripple on its energy.

    .. math:: U(x) = \tfrac{1}{2} ‖x‖^2 + η \sum_i \cos(x_i / s)

    Arguments:
        dim: D.
        amplitude: η, of the ripple, in nats.
        width: s; the paper has s = η, its released code s = η².

    Raises:
        ValueError: η or s is not positive.

    References:
        Hamiltonian Monte Carlo without detailed balance (Sohl-Dickstein, Mudigonda and DeWeese,
        2014).
    """

    def __init__(self, dim: int = 2, amplitude: float = 1e-2, width: float = 1e-2) -> None:
        if amplitude <= 0 or width <= 0:
            raise ValueError(f"amplitude and width must be positive, got {amplitude} and {width}")
        variance = _rough_well_variance(amplitude, width)
        identity = torch.eye(dim, dtype=torch.float64)
        super().__init__(torch.zeros(dim, dtype=torch.float64), variance * identity)
        self.amplitude = amplitude
        self.width = width

    def forward(self, position: Tensor) -> Tensor:
        """Return U at positions (B, D), in nats, (B,)."""
        ripple = self.amplitude * torch.cos(position / self.width)
        return (0.5 * position.square() + ripple).sum(dim=-1)

    def _draw(self, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        """Reject from the normal distribution, coordinate by coordinate: they are independent."""
        draws, waiting = noise, torch.ones_like(noise, dtype=torch.bool)
        while waiting.any():
            bound = torch.exp(-self.amplitude * (1 + torch.cos(noise / self.width)))
            uniform = torch.rand(
                noise.shape, generator=generator, dtype=noise.dtype, device=noise.device
            )
            draws = torch.where(waiting, noise, draws)
            waiting = waiting & (uniform >= bound)
            noise = standard_normal(noise, generator)
        return draws


def _rough_well_variance(amplitude: float, width: float) -> float:
    r"""Return the variance of one coordinate, to the precision of float64.

    With the Fourier coefficients c_k of exp(-η cos θ), which the trapezoidal rule gives to machine
    precision, both E 1 and E x² under the normal distribution are series in exp(-k² / 2s²):

    .. math:: \operatorname{Var} x = \frac{\sum_k c_k (1 - k^2/s^2) e^{-k^2/2s^2}}
        {\sum_k c_k e^{-k^2/2s^2}}
    """
    orders = math.ceil(9 * width) + 1  # exp(-9² / 2) < 1e-17
    points = 4 * (orders + math.ceil(amplitude) + 16)
    phase = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    order = torch.arange(-orders, orders + 1, dtype=torch.float64)
    coefficient = torch.exp(-amplitude * phase.cos()) @ torch.cos(phase[:, None] * order)
    squared = (order / width).square()
    weight = coefficient * torch.exp(-0.5 * squared)
    return float((weight * (1 - squared)).sum() / weight.sum())


class Funnel(Target):
    r"""Neal's funnel: a log-variance v and coordinates of that variance.

    .. math:: v \sim N(0, 3^2), \quad x_i \sim N(0, e^v), \quad
        U = \frac{v^2}{18} + \frac{D - 1}{2} v + \frac{e^{-v}}{2} \sum_i x_i^2

    The first coordinate of a point is v. The moments exist, but the tail e^v makes them useless
    for checking a chain: compare :meth:`quantiles`.

    Arguments:
        dim: D, with v.

    Raises:
        ValueError: D is below 2.

    References:
        Slice sampling (Neal, 2003), Section 8.
    """

    def __init__(self, dim: int = 10) -> None:
        if dim < 2:
            raise ValueError(f"a funnel has at least 2 dimensions, got {dim}")
        variances = torch.full((dim,), math.exp(4.5), dtype=torch.float64)
        variances[0] = 9.0
        super().__init__(torch.zeros_like(variances), variances.diag())

    def forward(self, position: Tensor) -> Tensor:
        """Return U at positions (B, D), in nats, (B,)."""
        log_variance, rest = position[:, 0], position[:, 1:]
        scaled = 0.5 * torch.exp(-log_variance) * rest.square().sum(dim=-1)
        return log_variance.square() / 18 + 0.5 * rest.shape[1] * log_variance + scaled

    def quantiles(self, probabilities: Tensor) -> Tensor:
        """Return the quantiles of each coordinate at ``probabilities`` (P,), float64, (P, D)."""
        probabilities = probabilities.double()
        normal = torch.special.ndtri(probabilities)
        # P(x ≤ q) = E Φ(q exp(-v / 2)) increases with q; its inverse by bisection, in logarithms.
        grid = torch.linspace(-9, 9, 2001).to(normal)
        weight = torch.exp(-0.5 * grid.square())
        low, high = torch.full_like(normal, -40.0), torch.full_like(normal, 40.0)
        for _ in range(64):
            middle = 0.5 * (low + high)
            tail = torch.special.ndtr(-torch.exp(middle[:, None] - 1.5 * grid))
            short = (tail @ weight) / weight.sum() > torch.minimum(probabilities, 1 - probabilities)
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        rest = normal.sign() * low.exp()
        return torch.cat([3 * normal[:, None], rest[:, None].expand(-1, self.dim - 1)], dim=1)

    def _draw(self, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        log_variance = 3 * noise[:, :1]
        return torch.cat([log_variance, torch.exp(0.5 * log_variance) * noise[:, 1:]], dim=1)


class Banana(Target):
    r"""A normal distribution in the plane, twisted along a parabola.

    .. math:: U(x) = \frac{x_1^2}{2σ^2} + \tfrac{1}{2} \bigl(x_2 - b (x_1^2 - σ^2)\bigr)^2

    Arguments:
        variance: σ², of the first coordinate.
        curvature: b.

    Raises:
        ValueError: σ² is not positive.

    References:
        Adaptive proposal distribution for random walk Metropolis algorithm (Haario, Saksman and
        Tamminen, 1999).
    """

    def __init__(self, variance: float = 100.0, curvature: float = 0.03) -> None:
        if variance <= 0:
            raise ValueError(f"the variance must be positive, got {variance}")
        second = 1 + 2 * (curvature * variance) ** 2
        covariance = torch.tensor([variance, second], dtype=torch.float64).diag()
        super().__init__(torch.zeros(2, dtype=torch.float64), covariance)
        self.variance = variance
        self.curvature = curvature

    def forward(self, position: Tensor) -> Tensor:
        """Return U at positions (B, 2), in nats, (B,)."""
        first, second = position.unbind(dim=-1)
        straight = second - self._bend(first)
        return 0.5 * (first.square() / self.variance + straight.square())

    def _draw(self, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        first = math.sqrt(self.variance) * noise[:, 0]
        return torch.stack([first, noise[:, 1] + self._bend(first)], dim=1)

    def _bend(self, first: Tensor) -> Tensor:
        return self.curvature * (first.square() - self.variance)


def ill_conditioned_gaussian(dim: int = 50) -> GaussianTarget:
    r"""Return the paper's ICG: independent variances, log-spaced from 1e-2 to 1e2.

    .. math:: σ_i^2 = 10^{-2 + 4 (i - 1) / (D - 1)}, \quad i = 1, …, D

    Arguments:
        dim: D.

    References:
        Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
        Sohl-Dickstein, 2018), Section 5.1.
    """
    variances = torch.logspace(-2, 2, dim, dtype=torch.float64)
    return GaussianTarget(torch.zeros(dim), variances.diag())


def strongly_correlated_gaussian(small_variance: float = 1e-2) -> GaussianTarget:
    r"""Return the paper's SCG: variances 1e2 and ``small_variance``, rotated by π/4.

    .. math:: Σ = R \operatorname{diag}(100, s) R^\top

    Arguments:
        small_variance: s; the notebook of the paper's released code has 0.1.

    References:
        Generalizing Hamiltonian Monte Carlo with Neural Networks (Levy, Hoffman and
        Sohl-Dickstein, 2018), Section 5.1.
    """
    mean, difference = 0.5 * (100 + small_variance), 0.5 * (100 - small_variance)
    return GaussianTarget(
        torch.zeros(2),
        torch.tensor([[mean, difference], [difference, mean]], dtype=torch.float64),
    )


TARGETS: dict[str, Callable[[], Target]] = {
    "icg": ill_conditioned_gaussian,
    "scg": strongly_correlated_gaussian,
    "mog": lambda: GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], [0.1, 0.1]),
    # Barriers of 8 nats from the wide side and 12 from the narrow one.
    "mog_unequal": lambda: GaussianMixture([[-4.0, 0.0], [4.0, 0.0]], [3.0, 0.05]),
    "rough_well": RoughWell,
    "funnel": Funnel,
    "banana": Banana,
}
"""The targets by name; each call builds a new one."""
