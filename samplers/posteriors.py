"""Posteriors of practice, whose answers only long runs tell."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus


class LogisticRegression(nn.Module):
    r"""Weights w of a logistic regression: which of 569 tumours are malignant.

    .. math:: U(w) = \sum_n \log(1 + e^{-y_n x_n^\top w}) + \tfrac{1}{2} ‖w‖^2

    with y = ±1 and x the 30 measurements of scikit-learn's breast cancer data, standardised, and a
    one: 31 dimensions, narrow in some directions, as many measurements say almost the same.
    """

    dim = 31
    start_scale = 1.0
    signed: Tensor

    def __init__(self) -> None:
        super().__init__()
        from sklearn.datasets import load_breast_cancer

        measurements, benign = load_breast_cancer(return_X_y=True)
        x = torch.from_numpy(measurements)
        x = (x - x.mean(dim=0)) / x.std(dim=0)
        x = torch.cat([x, torch.ones(len(x), 1).to(x)], dim=1)
        self.register_buffer("signed", (1 - 2 * torch.from_numpy(benign))[:, None] * x)

    def forward(self, position: Tensor) -> Tensor:
        """Return U at weights (B, 31), in nats, (B,)."""
        margins = position @ self.signed.to(position).T
        return softplus(-margins).sum(dim=1) + 0.5 * position.square().sum(dim=1)


class EightSchools(nn.Module):
    r"""Effects of coaching in eight schools, and what they have in common.

    .. math:: y_j \sim N(θ_j, s_j^2), \quad θ_j \sim N(μ, τ^2), \quad μ \sim N(0, 5^2),
        \quad τ \sim \text{half-Cauchy}(5)

    A point is (μ, log τ, θ), or where not centred (μ, log τ, (θ - μ)/τ): 10 dimensions. Centred it
    is a funnel.

    Arguments:
        centred: Whether a point holds θ itself.

    References:
        Bayesian Data Analysis (Gelman et al., 2013), Section 5.5.
    """

    dim = 10
    start_scale = 1.0
    effects: Tensor
    errors: Tensor

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.centred = centred
        self.register_buffer("effects", torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]))
        self.register_buffer("errors", torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]))

    def forward(self, position: Tensor) -> Tensor:
        """Return U at points (B, 10), in nats, (B,)."""
        mean, log_scale, schools = position[:, :1], position[:, 1:2], position[:, 2:]
        scale = log_scale.exp()
        white = (schools - mean) / scale if self.centred else schools
        theta = schools if self.centred else mean + scale * schools
        misfit = (self.effects.to(theta) - theta) / self.errors.to(theta)
        prior = 0.5 * (mean / 5).square() + torch.log1p((scale / 5).square()) - log_scale
        volume = 8 * log_scale if self.centred else 0.0
        squares = 0.5 * (misfit.square() + white.square()).sum(dim=1)
        return squares + (prior + volume).squeeze(1)


class StochasticVolatility(nn.Module):
    r"""Volatilities of 25 returns, and the three parameters of how they move.

    .. math:: y_t \sim N(0, e^{h_t}), \quad h_t = μ + φ (h_{t-1} - μ) + σ z_t,
        \quad h_1 = μ + σ z_1 / \sqrt{1 - φ^2}

    A point is (μ, logit((φ + 1)/2), log σ, z): 28 dimensions, with z ~ N(0, 1), μ ~ N(0, 1),
    (φ + 1)/2 ~ Beta(20, 3/2) and log σ ~ N(-1.5, 1). The returns are drawn from the model with
    μ = -1, φ = 0.95 and σ = 0.3.

    References:
        Stochastic volatility: likelihood inference and comparison with ARCH models (Kim, Shephard
        and Chib, 1998).
    """

    dim = 28
    start_scale = 0.3
    returns: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        point = torch.tensor([[-1.0, 3.664, -1.204]], dtype=torch.float64)
        noise = torch.randn(2, 25, generator=generator, dtype=torch.float64)
        volatility = self._volatility(torch.cat([point, noise[:1]], dim=1))
        self.register_buffer("returns", (torch.exp(0.5 * volatility) * noise[1])[0])

    def forward(self, position: Tensor) -> Tensor:
        """Return U at points (B, 28), in nats, (B,)."""
        mean, raw, log_scale = position[:, :3].unbind(dim=1)
        volatility = self._volatility(position)
        squared = self.returns.to(position).square() * torch.exp(-volatility)
        likelihood = 0.5 * (volatility + squared).sum(dim=1)
        # The density of Beta(20, 3/2) in its logit.
        persistence = 20 * logsigmoid(raw) + 1.5 * logsigmoid(-raw)
        priors = 0.5 * (mean.square() + (log_scale + 1.5).square()) - persistence
        return likelihood + priors + 0.5 * position[:, 3:].square().sum(dim=1)

    def _volatility(self, position: Tensor) -> Tensor:
        """Return h, (B, 25)."""
        mean, raw, log_scale = position[:, :3].unbind(dim=1)
        persistence, scale = torch.tanh(0.5 * raw), log_scale.exp()
        noise = position[:, 3:].unbind(dim=1)
        level = scale * noise[0] * torch.cosh(0.5 * raw)  # 1/√(1 - φ²)
        levels = [level]
        for z in noise[1:]:
            level = persistence * level + scale * z
            levels.append(level)
        return mean[:, None] + torch.stack(levels, dim=1)


class GaussianProcess(nn.Module):
    r"""Hyper-parameters of a Gaussian process: how diabetes depends on body mass and pressure.

    .. math:: y \sim N(0, K + s^2 I), \quad
        K_{ij} = a^2 \exp\bigl(-\tfrac{1}{2} \sum_d (x_{id} - x_{jd})^2 / ℓ_d^2\bigr)

    A point is (log ℓ₁, log ℓ₂, log a, log s), each N(0, 1) before the data: the first 40 patients
    of scikit-learn's diabetes data, standardised.

    References:
        Gaussian Processes for Machine Learning (Rasmussen and Williams, 2006), Section 5.4.1.
    """

    dim = 4
    start_scale = 1.0
    distances: Tensor
    outcome: Tensor

    def __init__(self) -> None:
        super().__init__()
        from sklearn.datasets import load_diabetes

        measurements, outcome = load_diabetes(return_X_y=True)
        x, y = torch.from_numpy(measurements[:40, 2:4]), torch.from_numpy(outcome[:40])
        x = (x - x.mean(dim=0)) / x.std(dim=0)
        self.register_buffer("distances", (x[:, None] - x).square())
        self.register_buffer("outcome", (y - y.mean()) / y.std())

    def forward(self, position: Tensor) -> Tensor:
        """Return U at points (B, 4), in nats, (B,); infinite where K is not positive definite."""
        lengths, amplitude, noise = position[:, :2], position[:, 2], position[:, 3]
        precision = torch.exp(-2 * lengths)[:, None, None]
        exponent = -0.5 * (self.distances.to(position) * precision).sum(dim=-1)
        identity = torch.eye(len(self.outcome)).to(position)
        kernel = torch.exp(exponent + 2 * amplitude[:, None, None])
        kernel = kernel + torch.exp(2 * noise)[:, None, None] * identity
        factor, failure = torch.linalg.cholesky_ex(kernel)
        y = self.outcome.to(position).expand(len(position), -1)[..., None]
        white = torch.linalg.solve_triangular(factor, y, upper=False)
        half_log_determinant = factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        value = 0.5 * white.square().sum(dim=(1, 2)) + half_log_determinant
        value = value + 0.5 * position.square().sum(dim=1)
        return torch.where(failure > 0, torch.inf, value)


POSTERIORS: dict[str, Callable[[], nn.Module]] = {
    "logistic_regression": LogisticRegression,
    "eight_schools": partial(EightSchools, centred=False),
    "eight_schools_centred": partial(EightSchools, centred=True),
    "stochastic_volatility": StochasticVolatility,
    "gaussian_process": GaussianProcess,
}
"""The posteriors by name; chains start well from N(0, s² I), s their ``start_scale``."""
