"""Shape and its errors, from distributions whose skewness and kurtosis are known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dglm.posterior import ChainMeans, Estimate, PrincipalAxes, between_chains
from samplers.adaptation import Moments

CHAINS, DRAWS = 200, 500


def along_first_axis(u: Tensor) -> ChainMeans:
    """Return the means of draws (chain, draw) of a distribution of mean 0 and variance 1."""
    axes = PrincipalAxes.of(Moments(torch.zeros(2), torch.tensor([1.0, 0.5]).diag()))
    return ChainMeans.of(axes, torch.stack([u, 0.5**0.5 * torch.randn_like(u)], dim=-1))


def autoregressive(chains: int, draws: int, memory: float) -> Tensor:
    """Return stationary chains of standard normal draws with autocorrelations memory^t."""
    noise = torch.randn(draws, chains) * (1 - memory**2) ** 0.5
    x = [torch.randn(chains)]
    for step in noise[1:]:
        x.append(memory * x[-1] + step)
    return torch.stack(x, dim=1)


def gamma(shape: float, size: tuple[int, int]) -> Tensor:
    """Return standardised gamma variables."""
    rate = torch.ones(())
    draws = torch.distributions.Gamma(torch.tensor(shape), rate).sample(size)
    return (draws - shape) / shape**0.5


def close(found: Estimate, exact: float, required: float) -> bool:
    """Return whether an estimate is within five standard errors, which must be small enough."""
    assert 0 < found.standard_error < required
    return bool((found.value - exact).abs() < 5 * found.standard_error)


@pytest.mark.parametrize(
    ("draw", "skewness", "kurtosis", "errors"),
    [
        (lambda: gamma(4.0, (CHAINS, DRAWS)), 1.0, 1.5, (0.03, 0.15)),
        (lambda: gamma(16.0, (CHAINS, DRAWS)), 0.5, 0.375, (0.03, 0.15)),
        (lambda: gamma(1.0, (CHAINS, DRAWS)), 2.0, 6.0, (0.05, 0.6)),
        (lambda: 12**0.5 * (torch.rand(CHAINS, DRAWS) - 0.5), 0.0, -1.2, (0.01, 0.01)),
        (lambda: torch.randn(CHAINS, DRAWS), 0.0, 0.0, (0.03, 0.03)),
    ],
    ids=["gamma of 4", "gamma of 16", "exponential", "uniform", "Gaussian"],
)
def test_distributions_have_their_known_shape(
    draw: Callable[[], Tensor], skewness: float, kurtosis: float, errors: tuple[float, float]
) -> None:
    means = along_first_axis(draw())
    assert close(means.skewness(), skewness, errors[0])
    assert close(means.excess_kurtosis(), kurtosis, errors[1])


def test_location_and_scale_do_not_matter() -> None:
    u = gamma(4.0, (CHAINS, DRAWS))
    plain, moved = along_first_axis(u), along_first_axis(0.7 * u - 0.3)
    for name in ("skewness", "excess_kurtosis"):
        one, other = getattr(plain, name)(), getattr(moved, name)()
        assert torch.allclose(torch.stack(one), torch.stack(other))


@pytest.mark.parametrize("name", ["skewness", "excess_kurtosis"])
def test_errors_are_as_large_as_the_scatter_of_autocorrelated_chains(name: str) -> None:
    repeats, chains = 100, 30
    u = 5 * ((0.2 * autoregressive(repeats * chains, DRAWS, 0.6)).exp() - 1)
    found = [getattr(along_first_axis(part), name)() for part in u.split(chains)]
    values, errors = (torch.stack(parts) for parts in zip(*found, strict=True))
    ratio = values.std() / errors.square().mean().sqrt()
    # The error of a standard deviation of Gaussian figures.
    assert abs(ratio.log()) < 5 / (2 * repeats) ** 0.5


@pytest.mark.parametrize("memory", [0.0, 0.8, -0.8])
def test_effective_sample_size_is_that_of_an_autoregression(memory: float) -> None:
    draws = torch.stack([autoregressive(2000, DRAWS, memory), torch.randn(2000, DRAWS)], dim=-1)
    axes = PrincipalAxes.of(Moments(torch.zeros(2), torch.tensor([1.0, 0.9]).diag()))
    means = ChainMeans.of(axes, draws)
    for power in (1, 2):
        found = means.effective_sample_size(power)
        lag = memory**power
        # Var(mean of n) · n / Var = 1 + 2 Σ (1 - t / n) φ^t, the sum in closed form.
        inverse = (1 + lag) / (1 - lag) - 2 * lag * (1 - lag**DRAWS) / DRAWS / (1 - lag) ** 2
        exact = 2000 * DRAWS * torch.tensor([1 / inverse, 1.0])
        assert (found.standard_error < 0.05 * exact).all()
        assert ((found.value - exact).abs() < 5 * found.standard_error).all()


def test_the_error_of_a_mean_and_of_its_square() -> None:
    features = 3 + torch.randn(30, 1)
    mean, error = features.mean(), features.std() / 30**0.5
    found = between_chains(lambda expectation: expectation[0], features)
    assert torch.allclose(torch.stack(found), torch.stack([mean, error]))
    found = between_chains(lambda expectation: expectation[0].square(), features)
    assert torch.allclose(torch.stack(found), torch.stack([mean.square(), 2 * mean * error]))


def test_one_chain_has_no_error() -> None:
    with pytest.raises(ValueError, match="between chains need at least 2, got 1"):
        along_first_axis(torch.randn(1, 50)).skewness()


@pytest.fixture
def rotated() -> Moments:
    """Three coordinates, two of them correlated."""
    covariance = torch.tensor([[2.0, 1.5, 0.0], [1.5, 2.0, 0.0], [0.0, 0.0, 1.0]])
    return Moments(torch.tensor([1.0, -1.0, 0.0]), covariance)


def test_principal_axes_are_the_widest_directions(rotated: Moments) -> None:
    axes = PrincipalAxes.of(rotated)
    assert torch.allclose(axes.directions[0].abs(), torch.tensor([0.5, 0.5, 0.0]).sqrt())
    assert axes.directions[0].max() > 0.7
    assert torch.allclose(axes.directions[1], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.allclose(axes.scale, torch.tensor([3.5, 1.0]).sqrt())
    assert torch.allclose(axes.std, torch.tensor([2.0, 2.0, 1.0]).sqrt())


def test_draws_are_standardised_in_the_plane(rotated: Moments) -> None:
    distribution = torch.distributions.MultivariateNormal(*rotated)
    projected = PrincipalAxes.of(rotated).project(distribution.sample((10_000,)))
    assert projected.mean(dim=0).abs().max() < 5 / 100
    assert (projected.T.cov() - torch.eye(2)).abs().max() < 5 * 2**0.5 / 100


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (lambda: Moments(torch.zeros(1), torch.ones(1, 1)), "at least 2 coordinates, got 1"),
        (lambda: Moments(torch.zeros(2), torch.tensor([1.0, 0.0]).diag()), "did not move"),
    ],
)
def test_what_has_no_plane_is_refused(moments: Callable[[], Moments], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrincipalAxes.of(moments())
