import pytest
import torch
from torch import Tensor, distributions

from dglm import Bernoulli, Gaussian
from dglm.likelihoods import Likelihood
from samplers import seeded_generator


def test_bernoulli_agrees_with_torch_distributions(images: Tensor) -> None:
    logits = 3 * torch.randn(images.shape)
    expected = distributions.Bernoulli(logits=logits).log_prob(images).sum(dim=-1)
    torch.testing.assert_close(Bernoulli().log_prob(logits, images), expected)
    torch.testing.assert_close(
        Bernoulli().mean(logits), distributions.Bernoulli(logits=logits).mean
    )


def test_bernoulli_takes_grey_pixels_as_expected_ones() -> None:
    logits, grey = torch.randn(4, 6), torch.rand(4, 6)
    likelihood, ones = Bernoulli(), torch.ones(4, 1)
    for pixel in range(6):
        one = logits[:, [pixel]]
        expected = grey[:, pixel] * likelihood.log_prob(one, ones)
        expected += (1 - grey[:, pixel]) * likelihood.log_prob(one, 0 * ones)
        torch.testing.assert_close(likelihood.log_prob(one, grey[:, [pixel]]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_is_finite_and_exact_at_extreme_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4], [1e4], [-1e4], [-1e4]], dtype=dtype, requires_grad=True)
    x = torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=dtype)
    value = Bernoulli().log_prob(logits, x)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert torch.equal(value, torch.tensor([0.0, -1e4, -1e4, 0.0], dtype=dtype))
    assert torch.equal(gradient, torch.tensor([[0.0], [-1.0], [1.0], [0.0]], dtype=dtype))
    assert torch.equal(Bernoulli().sample(logits.detach()), (logits > 0).to(dtype))


def test_gaussian_agrees_with_torch_distributions() -> None:
    mean, x = torch.randn(4, 6), torch.randn(4, 6)
    expected = distributions.Normal(mean, 0.3).log_prob(x).sum(dim=-1)
    torch.testing.assert_close(Gaussian(0.3).log_prob(mean, x), expected)
    assert torch.equal(Gaussian(0.3).mean(mean), mean)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(0.3)], ids=["bernoulli", "gaussian"])
def test_samples_have_the_moments_of_the_distribution(likelihood: Likelihood) -> None:
    count, parameters = 50_000, torch.tensor([-2.0, 0.0, 0.7])
    probability = torch.sigmoid(parameters)
    expected = {
        Bernoulli: (probability, probability * (1 - probability)),
        Gaussian: (parameters, torch.full((3,), 0.09)),
    }
    mean, variance = expected[type(likelihood)]
    x = likelihood.sample(parameters.expand(count, 3), seeded_generator("cpu", 0))
    standardised = (x - mean) / variance.sqrt()
    assert (standardised.mean(dim=0).abs() < 5 / count**0.5).all()
    products = standardised.mT @ standardised / count
    fourth = standardised.pow(4).mean(dim=0).max()
    assert ((products - torch.eye(3)).abs() < 5 * (fourth / count) ** 0.5).all()


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian()], ids=["bernoulli", "gaussian"])
def test_samples_are_a_function_of_the_generator(likelihood: Likelihood) -> None:
    parameters = torch.randn(20, 6)
    first, again, other = (
        likelihood.sample(parameters, seeded_generator("cpu", seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_gaussian_needs_a_positive_scale(scale: float) -> None:
    with pytest.raises(ValueError, match=f"positive number, got {scale}"):
        Gaussian(scale)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian()], ids=["bernoulli", "gaussian"])
def test_observations_must_be_finite(likelihood: Likelihood, number: float) -> None:
    x = torch.zeros(4, 6)
    x[1, 2] = x[3, 0] = x[3, 1] = number
    with pytest.raises(ValueError, match="2 of 4 observations hold NaN or infinite"):
        likelihood.check(x)


@pytest.mark.parametrize("pixel", [-0.001, 1.001, 255.0])
def test_only_bernoulli_needs_observations_between_zero_and_one(pixel: float) -> None:
    x = torch.tensor([[0.0, pixel, 1.0]])
    Gaussian().check(x)
    with pytest.raises(ValueError, match=r"needs observations in \[0, 1\]"):
        Bernoulli().check(x)


def test_bernoulli_takes_the_whole_interval() -> None:
    Bernoulli().check(torch.linspace(0, 1, 12).view(2, 6))
