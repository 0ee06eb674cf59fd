from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from dglm import GenerativeModel
from dglm.posterior import long_chain_log_joint
from samplers import seeded_generator

Model = Callable[..., GenerativeModel]
ExactPosterior = Callable[[GenerativeModel, Tensor], MultivariateNormal]

COPIES = 200
"""Chains of the same image, whose spread gives the standard error of their mean."""


def error_of(log_joints: Tensor, exact: float) -> float:
    """Return how many standard errors the mean over chains is off."""
    return float((log_joints.mean() - exact) / (log_joints.std() / COPIES**0.5))


def test_mean_is_that_of_the_exact_posterior(
    linear_gaussian: Model, exact_posterior: ExactPosterior
) -> None:
    model = linear_gaussian(3, 5, 0.5)
    x, _ = model.sample(1, seeded_generator("cpu", 1))
    posterior = exact_posterior(model, x)
    # E log p(x, z) is log p(x, ·) at the mean minus half the trace of precision times covariance.
    exact = float(model.log_joint(x, posterior.mean).detach()) - 3 / 2
    found = long_chain_log_joint(
        model, x.expand(COPIES, -1), torch.randn(COPIES, 3), 200, 4, seeded_generator("cpu", 0)
    )
    assert found.shape == (COPIES,)
    assert not found.requires_grad
    assert abs(error_of(found, exact)) < 5


def test_mean_is_that_of_quadrature(one_pixel: GenerativeModel) -> None:
    x, z = torch.tensor([[1.0, 0.0]]), torch.linspace(-10, 10, 4001)[:, None]
    log_joint = one_pixel.log_joint(x.expand(4001, -1), z).detach()
    exact = float((log_joint.softmax(dim=0) * log_joint).sum())
    start = torch.full((COPIES, 1), 4.0)
    found = long_chain_log_joint(
        one_pixel, x.expand(COPIES, -1), start, 200, 4, seeded_generator("cpu", 0)
    )
    assert abs(error_of(found, exact)) < 5


@pytest.fixture
def one_pixel() -> GenerativeModel:
    """Two pixels and one latent variable, with a skewed posterior."""
    decoder = nn.Linear(1, 2)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[4.0], [-1.0]]))
        decoder.bias.copy_(torch.tensor([-1.0, 0.5]))
    return GenerativeModel(decoder, 1)


def test_images_keep_their_order(linear_gaussian: Model, exact_posterior: ExactPosterior) -> None:
    model = linear_gaussian(2, 5, 1.0)
    x = model.decoder.bias.detach() + torch.arange(4.0)[:, None]
    rows, start = x.repeat_interleave(COPIES, dim=0), torch.zeros(4 * COPIES, 2)
    found = long_chain_log_joint(model, rows, start, 100, 4, seeded_generator("cpu", 0))
    exact = model.log_joint(x, exact_posterior(model, x).mean).detach() - 2 / 2
    assert exact.diff().abs().min() > 0.5
    for chains, wanted in zip(found.view(4, COPIES), exact.tolist(), strict=True):
        assert abs(error_of(chains, wanted)) < 5


def test_means_are_a_function_of_the_generator(model: GenerativeModel, images: Tensor) -> None:
    first, again, other = (
        long_chain_log_joint(model, images, torch.zeros(7, 3), 4, 2, seeded_generator("cpu", seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("num_steps", [1, 0])
def test_a_long_chain_has_both_halves(
    model: GenerativeModel, images: Tensor, num_steps: int
) -> None:
    with pytest.raises(ValueError, match=f"num_steps must be at least 2, got {num_steps}"):
        long_chain_log_joint(model, images, torch.zeros(7, 3), num_steps)
