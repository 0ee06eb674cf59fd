"""All likelihoods and Gaussians against torch.distributions."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, distributions
from torch.distributions import Distribution, Independent, Normal

from dglm import Bernoulli, DiagonalGaussian, Gaussian
from dglm.gaussian import gaussian_log_prob
from dglm.likelihoods import Likelihood
from samplers import seeded_generator


class Case(NamedTuple):
    likelihood: Likelihood
    distribution: Callable[[Tensor], Distribution]
    impossible: list[float]
    """Observations, beside what is not finite."""


CASES = {
    "Bernoulli": Case(
        Bernoulli(),
        # Grey pixels count as expected ones.
        lambda logits: distributions.Bernoulli(logits=logits, validate_args=False),
        [-0.001, 1.001, 255.0],
    ),
    "Gaussian": Case(Gaussian(0.3), lambda mean: Normal(mean, 0.3), []),
}
LIKELIHOODS = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@LIKELIHOODS
def test_values_gradients_and_means_are_those_of_the_distribution(case: Case) -> None:
    parameters, x = 3 * torch.randn(7, 6, requires_grad=True), torch.rand(7, 6)
    expected = case.distribution(parameters)
    log_prob = case.likelihood.log_prob(parameters, x)
    torch.testing.assert_close(log_prob, expected.log_prob(x).sum(dim=-1))
    found, wanted = (
        torch.autograd.grad(each.sum(), parameters, retain_graph=True)
        for each in (log_prob, expected.log_prob(x))
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(case.likelihood.mean(parameters), expected.mean)


@LIKELIHOODS
def test_samples_have_the_moments_of_the_distribution(case: Case) -> None:
    count, parameters = 50_000, torch.tensor([-2.0, 0.0, 0.7])
    expected = case.distribution(parameters)
    x = case.likelihood.sample(parameters.expand(count, 3), seeded_generator("cpu", 0))
    check_standard((x - expected.mean) / expected.variance.sqrt())


def check_standard(draws: Tensor) -> None:
    """Check that draws have means of 0, variances of 1 and no correlation."""
    count, dim = draws.shape
    assert (draws.mean(dim=0).abs() < 5 / count**0.5).all()
    fourth = draws.pow(4).mean(dim=0).max()
    products = draws.mT @ draws / count
    assert ((products - torch.eye(dim)).abs() < 5 * (fourth / count) ** 0.5).all()


@LIKELIHOODS
def test_what_cannot_be_observed_is_refused(case: Case) -> None:
    case.likelihood.check(torch.linspace(0, 1, 12).view(2, 6))
    for number in (torch.nan, torch.inf, -torch.inf):
        x = torch.zeros(4, 6)
        x[1, 2] = x[3, 0] = x[3, 1] = number
        with pytest.raises(ValueError, match="2 of 4 observations hold NaN or infinite"):
            case.likelihood.check(x)
    for pixel in (-0.001, 1.001, 255.0):
        x = torch.tensor([[0.0, pixel, 1.0]])
        if pixel in case.impossible:
            with pytest.raises(ValueError, match=r"needs observations in \[0, 1\]"):
                case.likelihood.check(x)
        else:
            case.likelihood.check(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_is_finite_and_exact_at_extreme_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4], [1e4], [-1e4], [-1e4]], dtype=dtype, requires_grad=True)
    x = torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=dtype)
    value = Bernoulli().log_prob(logits, x)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert torch.equal(value, torch.tensor([0.0, -1e4, -1e4, 0.0], dtype=dtype))
    assert torch.equal(gradient, torch.tensor([[0.0], [-1.0], [1.0], [0.0]], dtype=dtype))
    assert torch.equal(Bernoulli().sample(logits.detach()), (logits > 0).to(dtype))


# Gaussians of latent variables


def test_a_diagonal_gaussian_is_that_of_torch_distributions() -> None:
    mean, log_std, z = torch.randn(3, 5, 3).unbind()
    gaussian = DiagonalGaussian(mean, log_std)
    expected = Independent(Normal(mean, log_std.exp()), 1)
    torch.testing.assert_close(gaussian.log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(gaussian.entropy(), expected.entropy())
    torch.testing.assert_close(gaussian.variance(), expected.variance)


@pytest.mark.parametrize("std", [None, 0.3])
def test_one_log_std_serves_all_coordinates(std: float | None) -> None:
    x = torch.randn(5, 3)
    expected = Normal(torch.zeros(()), std or 1.0).log_prob(x).sum(dim=-1)
    found = gaussian_log_prob(x / std, float(torch.tensor(std).log())) if std else None
    torch.testing.assert_close(gaussian_log_prob(x) if found is None else found, expected)


def test_draws_are_differentiable_and_have_its_moments() -> None:
    count = 50_000
    mean = torch.tensor([1.0, -2.0]).expand(count, 2).requires_grad_()
    log_std = torch.tensor([-1.0, 0.5]).expand(count, 2).requires_grad_()
    z = DiagonalGaussian(mean, log_std).sample(seeded_generator("cpu", 0))
    check_standard(((z - mean) / log_std.exp()).detach())
    of_mean, of_log_std = torch.autograd.grad(z.sum(), (mean, log_std))
    torch.testing.assert_close(of_mean, torch.ones(count, 2))
    torch.testing.assert_close(of_log_std, (z - mean).detach())
