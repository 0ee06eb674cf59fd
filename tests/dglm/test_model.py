from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

from dglm import Gaussian, GenerativeModel
from samplers import seeded_generator, value_and_gradient


@pytest.fixture
def z() -> Tensor:
    return torch.randn(7, 3)


def log_joint_by_hand(model: GenerativeModel, x: Tensor, z: Tensor) -> Tensor:
    prior = Normal(0.0, 1.0).log_prob(z).sum(dim=-1)
    return prior + Bernoulli(logits=model.decoder(z)).log_prob(x).sum(dim=-1)


def test_log_joint_agrees_with_torch_distributions(
    model: GenerativeModel, images: Tensor, z: Tensor
) -> None:
    torch.testing.assert_close(model.log_joint(images, z), log_joint_by_hand(model, images, z))
    parts = model.log_prior(z) + model.log_likelihood(images, z)
    torch.testing.assert_close(model.log_joint(images, z), parts)


def test_log_joint_of_real_observations(z: Tensor) -> None:
    model, x = GenerativeModel(nn.Linear(3, 6), 3, Gaussian(0.2)), torch.randn(7, 6)
    prior = Normal(0.0, 1.0).log_prob(z).sum(dim=-1)
    expected = prior + Normal(model.decoder(z), 0.2).log_prob(x).sum(dim=-1)
    torch.testing.assert_close(model.log_joint(x, z), expected)


def test_energy_is_minus_log_joint_and_so_is_its_gradient(
    model: GenerativeModel, images: Tensor, z: Tensor
) -> None:
    state, leaf = value_and_gradient(model.energy(images), z), z.clone().requires_grad_()
    log_joint = log_joint_by_hand(model, images, leaf)
    torch.testing.assert_close(state.energy, -log_joint.detach())
    (gradient,) = torch.autograd.grad(log_joint.sum(), leaf)
    torch.testing.assert_close(state.gradient, -gradient)


def test_misfit_is_the_energy_without_the_prior(
    model: GenerativeModel, images: Tensor, z: Tensor
) -> None:
    expected = -log_joint_by_hand(model, images, z) + model.log_prior(z)
    torch.testing.assert_close(model.negative_log_likelihood(images)(z), expected)


def test_no_gradient_reaches_the_decoder_through_the_energy(
    model: GenerativeModel, images: Tensor, z: Tensor
) -> None:
    position = z.requires_grad_()
    state = value_and_gradient(model.energy(images), position)
    gradients = torch.autograd.grad(
        state.energy.sum() + state.gradient.square().sum(),
        [position, *model.parameters()],
        allow_unused=True,
    )
    assert gradients[0].abs().min() > 0
    assert gradients[1:] == (None,) * len(gradients[1:])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_new_energy_sees_weights_that_were_updated_in_place(
    model: GenerativeModel, images: Tensor, z: Tensor
) -> None:
    before = model.energy(images)(z)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    after = model.energy(images)(z)
    torch.testing.assert_close(after, -log_joint_by_hand(model, images, z).detach())
    assert ((after - before).abs() > 1e-3).all()


def test_energy_is_finite_at_extreme_logits(images: Tensor) -> None:
    decoder = nn.Linear(3, 6)
    nn.init.constant_(decoder.weight, 1e4)
    model = GenerativeModel(decoder.float(), 3)
    z = torch.tensor([1.0, 1.0, -1.0]).repeat(7, 1) * torch.tensor([1.0, -1.0] * 3 + [1.0])[:, None]
    state = value_and_gradient(model.energy(images.float()), z.float())
    assert model.decoder(z.float()).abs().min() > 9e3
    assert state.energy.isfinite().all()
    assert state.gradient.isfinite().all()


def test_energy_works_in_inference_mode(model: GenerativeModel, images: Tensor, z: Tensor) -> None:
    expected = value_and_gradient(model.energy(images), z)
    with torch.inference_mode():
        found = value_and_gradient(model.energy(images), z)
    torch.testing.assert_close(found.energy, expected.energy)
    torch.testing.assert_close(found.gradient, expected.gradient)


def test_a_decoder_with_buffers_keeps_them(images: Tensor, z: Tensor) -> None:
    decoder = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)).eval()
    decoder[1].running_mean.normal_()
    model = GenerativeModel(decoder, 3)
    expected = -log_joint_by_hand(model, images, z).detach()
    torch.testing.assert_close(model.energy(images)(z), expected)


def test_samples_have_the_moments_of_the_model(
    linear_gaussian: Callable[..., GenerativeModel],
) -> None:
    count, model = 50_000, linear_gaussian(2, 4, 0.5)
    x, z = model.sample(count, seeded_generator("cpu", 0))
    weight = model.decoder.weight.detach()
    joint = torch.cat([torch.eye(2), weight])
    covariance = joint @ joint.mT
    covariance[2:, 2:] += 0.25 * torch.eye(4)
    centred = torch.cat([z, x - model.decoder.bias.detach()], dim=-1)
    variance = covariance.diagonal()
    assert (centred.mean(dim=0).abs() < 5 * (variance / count).sqrt()).all()
    # var(x y) = var(x) var(y) + cov(x, y)² for centred Gaussians.
    error = ((variance[:, None] * variance + covariance.square()) / count).sqrt()
    assert ((centred.mT @ centred / count - covariance).abs() < 5 * error).all()


def test_samples_are_a_function_of_the_generator(model: GenerativeModel) -> None:
    first, again, other = (model.sample(20, seeded_generator("cpu", seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_samples_take_the_type_of_the_decoder(model: GenerativeModel) -> None:
    x, z = model.float().sample(2)
    assert x.dtype == z.dtype == torch.float32


def test_a_decoder_may_have_no_parameters(images: Tensor) -> None:
    model = GenerativeModel(nn.Softplus(), 6)
    model.observations(images)
    z = torch.randn(7, 6)
    torch.testing.assert_close(model.energy(images)(z), -log_joint_by_hand(model, images, z))
    assert model.sample(5)[0].shape == (5, 6)


def test_latent_dim_must_be_positive() -> None:
    with pytest.raises(ValueError, match="latent_dim must be at least 1, got 0"):
        GenerativeModel(nn.Linear(1, 6), 0)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5), r"flat, \(B, 6\), or images of 6 numbers, got \(2, 5\)"),
        (torch.zeros(6), r"got \(6,\)"),
        (torch.zeros(2, 28, 28), r"got \(2, 28, 28\)"),
        (torch.zeros(0, 6), "the batch is empty"),
        (torch.full((2, 6), torch.nan), "2 of 2 observations hold NaN"),
        (torch.full((2, 6), 2.0), r"in \[0, 1\], got \[2, 2\]"),
        (torch.full((2, 6), -0.5), r"in \[0, 1\], got \[-0.5, -0.5\].*Normalize"),
        (torch.full((2, 6), 255, dtype=torch.uint8), "divide images of 0 to 255 by 255"),
        ("images", "must be a tensor or an array, got <class 'str'>"),
    ],
)
def test_impossible_observations_are_refused(model: GenerativeModel, x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.observations(x)


@pytest.mark.parametrize(
    "given",
    [
        lambda x: x,
        lambda x: x.view(7, 1, 2, 3),
        lambda x: x.numpy(),
        lambda x: x.int(),
        lambda x: x.bool(),
        lambda x: x.half(),
        lambda x: x.tolist(),
        lambda x: [x, torch.arange(7)],
        lambda x: (x.view(7, 2, 3), torch.arange(7)),
    ],
)
def test_observations_are_taken_in_any_usual_form(
    model: GenerativeModel, images: Tensor, given: Callable[[Tensor], Any]
) -> None:
    found = model.observations(given(images))
    assert torch.equal(found, images)
    assert found.dtype == torch.float64


def test_real_numbers_suit_a_gaussian(model: GenerativeModel, images: Tensor) -> None:
    x = 1e3 * images - 500
    assert torch.equal(GenerativeModel(model.decoder, 3, Gaussian()).observations(x), x)


def test_a_decoder_must_return_flat_observations(images: Tensor) -> None:
    decoder = nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (1, 2, 3)))
    with pytest.raises(ValueError, match=r"flat \(B, N\), but .* \(3, 1, 2, 3\) .*Flatten\(\)"):
        GenerativeModel(decoder, 3).observations(images)
    GenerativeModel(nn.Sequential(decoder, nn.Flatten()), 3).observations(images)


def test_a_decoder_of_logits_must_not_end_in_a_sigmoid(images: Tensor) -> None:
    decoder = nn.Sequential(nn.Linear(3, 6), nn.Sigmoid())
    with pytest.raises(ValueError, match=r"takes logits, .* leave out the Sigmoid"):
        GenerativeModel(decoder, 3).observations(images)
    GenerativeModel(decoder, 3, Gaussian()).observations(images)


# The model of some of the observations


GIVEN = torch.tensor([True, False, True, True, False, True])


def test_the_marginal_model_sums_over_the_other_observations(
    model: GenerativeModel, images: Tensor, z: Tensor
) -> None:
    patterns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2)
    whole = images.repeat(4, 1, 1)
    whole[..., ~GIVEN] = patterns[:, None]
    joint = torch.stack([log_joint_by_hand(model, x, z) for x in whole])
    marginal = model.marginal(GIVEN)
    torch.testing.assert_close(marginal.log_joint(images[:, GIVEN], z), joint.logsumexp(dim=0))


def test_the_marginal_model_follows_the_decoder(
    model: GenerativeModel, images: Tensor, z: Tensor
) -> None:
    marginal = model.marginal(GIVEN)
    before = marginal.log_joint(images[:, GIVEN], z)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(2)
    assert not torch.allclose(marginal.log_joint(images[:, GIVEN], z), before)


@pytest.mark.parametrize("likelihood", [None, Gaussian(0.3)])
def test_the_energy_of_the_marginal_model(likelihood: Gaussian | None, z: Tensor) -> None:
    model, x = GenerativeModel(nn.Linear(3, 6), 3, likelihood).marginal(GIVEN), torch.rand(7, 4)
    state, leaf = value_and_gradient(model.energy(x), z), z.clone().requires_grad_()
    torch.testing.assert_close(state.energy, -model.log_joint(x, z).detach())
    (gradient,) = torch.autograd.grad(-model.log_joint(x, leaf).sum(), leaf)
    torch.testing.assert_close(state.gradient, gradient)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (GIVEN.double(), r"must be boolean, \(6,\), got torch.float64, \(6,\)"),
        (GIVEN[:5], r"got torch.bool, \(5,\)"),
        (GIVEN.expand(7, 6), r"got torch.bool, \(7, 6\)"),
        (torch.zeros(6).bool(), "no observation is given"),
    ],
)
def test_impossible_masks_are_refused(model: GenerativeModel, given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.marginal(given)
