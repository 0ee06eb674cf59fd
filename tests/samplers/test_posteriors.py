"""Posteriors of practice, each against the same density written with torch.distributions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    HalfCauchy,
    MultivariateNormal,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
)

from samplers.posteriors import (
    POSTERIORS,
    EightSchools,
    GaussianProcess,
    LogisticRegression,
    StochasticVolatility,
)


def log_regression(target: LogisticRegression, w: Tensor) -> Tensor:
    # The rows are y x, so that each outcome is 1.
    likelihood = Bernoulli(logits=target.signed @ w).log_prob(torch.ones(569)).sum()
    return likelihood + Normal(0, 1).log_prob(w).sum()


def log_schools(target: EightSchools, point: Tensor) -> Tensor:
    mean, scale = point[0], point[1].exp()
    theta = point[2:] if target.centred else mean + scale * point[2:]
    total = Normal(theta, target.errors).log_prob(target.effects).sum()
    total += Normal(mean, scale).log_prob(theta).sum() + Normal(0, 5).log_prob(mean)
    total += HalfCauchy(5.0).log_prob(scale) + scale.log()
    return total if target.centred else total + 8 * scale.log()


def log_volatility(target: StochasticVolatility, point: Tensor) -> Tensor:
    mean, phi, scale = point[0], 2 * point[1].sigmoid() - 1, point[2].exp()
    levels = [mean + scale / (1 - phi**2).sqrt() * point[3]]
    for z in point[4:]:
        levels.append(mean + phi * (levels[-1] - mean) + scale * z)
    total = Normal(0, (0.5 * torch.stack(levels)).exp()).log_prob(target.returns).sum()
    logit = TransformedDistribution(Beta(20.0, 1.5), [SigmoidTransform().inv])
    total += logit.log_prob(point[1]) + Normal(0, 1).log_prob(mean)
    return total + Normal(-1.5, 1).log_prob(point[2]) + Normal(0, 1).log_prob(point[3:]).sum()


def log_process(target: GaussianProcess, point: Tensor) -> Tensor:
    lengths, amplitude, noise = point[:2].exp(), point[2].exp(), point[3].exp()
    kernel = amplitude**2 * (-0.5 * (target.distances / lengths**2).sum(dim=-1)).exp()
    covariance = kernel + noise**2 * torch.eye(40)
    total = MultivariateNormal(torch.zeros(40), covariance).log_prob(target.outcome)
    return total + Normal(0, 1).log_prob(point).sum()


LOG_DENSITIES: dict[str, Callable[..., Tensor]] = {
    "logistic_regression": log_regression,
    "eight_schools": log_schools,
    "eight_schools_centred": log_schools,
    "stochastic_volatility": log_volatility,
    "gaussian_process": log_process,
}


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_energy_is_minus_the_log_density_up_to_a_constant(name: str) -> None:
    target = POSTERIORS[name]().double()
    points = 0.5 * torch.randn(6, target.dim)
    expected = torch.stack([-LOG_DENSITIES[name](target, point) for point in points])
    difference = target(points) - expected
    torch.testing.assert_close(difference, difference[:1].expand(6), rtol=1e-9, atol=1e-9)


def test_a_covariance_that_is_not_positive_definite_is_infinite_energy_for_its_chain_alone() -> (
    None
):
    target = GaussianProcess().float()
    points = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, -9.0]])
    energy = target(points)
    assert energy[0].isfinite()
    assert energy[1] == torch.inf
