import pytest
import torch
from torch.distributions import Independent, Normal

from dglm import DiagonalGaussian
from dglm.gaussian import gaussian_log_prob
from samplers import seeded_generator


@pytest.fixture
def gaussian() -> DiagonalGaussian:
    return DiagonalGaussian(torch.randn(5, 3), torch.randn(5, 3))


def distribution(gaussian: DiagonalGaussian) -> Independent:
    return Independent(Normal(gaussian.mean, gaussian.log_std.exp()), 1)


def test_agrees_with_torch_distributions(gaussian: DiagonalGaussian) -> None:
    z, expected = torch.randn(5, 3), distribution(gaussian)
    torch.testing.assert_close(gaussian.log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(gaussian.entropy(), expected.entropy())
    torch.testing.assert_close(gaussian.variance(), expected.variance)


def test_one_log_std_serves_all_coordinates() -> None:
    x = torch.randn(5, 3)
    expected = Independent(Normal(torch.zeros(5, 3), 0.3), 1).log_prob(x)
    log_std = torch.tensor(0.3).log()
    torch.testing.assert_close(gaussian_log_prob(x / 0.3, float(log_std)), expected)
    standard = Independent(Normal(torch.zeros(5, 3), 1.0), 1).log_prob(x)
    torch.testing.assert_close(gaussian_log_prob(x), standard)


def test_samples_have_its_moments() -> None:
    count = 50_000
    mean, log_std = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 0.5])
    gaussian = DiagonalGaussian(mean.expand(count, 2), log_std.expand(count, 2))
    z = (gaussian.sample(seeded_generator("cpu", 0)) - mean) / log_std.exp()
    assert (z.mean(dim=0).abs() < 5 / count**0.5).all()
    # var(z²) = 2 bounds that of the product of two coordinates.
    assert ((z.mT @ z / count - torch.eye(2)).abs() < 5 * (2 / count) ** 0.5).all()


def test_samples_are_differentiable_in_mean_and_standard_deviation(
    gaussian: DiagonalGaussian,
) -> None:
    mean, log_std = (tensor.requires_grad_() for tensor in gaussian)
    z = DiagonalGaussian(mean, log_std).sample()
    mean_gradient, log_std_gradient = torch.autograd.grad(z.sum(), (mean, log_std))
    torch.testing.assert_close(mean_gradient, torch.ones(5, 3))
    torch.testing.assert_close(log_std_gradient, (z - mean).detach())


def test_samples_are_a_function_of_the_generator(gaussian: DiagonalGaussian) -> None:
    first, again, other = (gaussian.sample(seeded_generator("cpu", seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
