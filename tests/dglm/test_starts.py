from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from dglm import Encoder, FittedStart, GenerativeModel
from dglm.gaussian import DenseGaussian
from dglm.starts import (
    WhitenedLikelihood,
    annealed_path,
    encoded,
    of_images,
    starting_gaussians,
)
from samplers import HMC, seeded_generator, value_and_gradient

Model = Callable[..., GenerativeModel]
ExactPosterior = Callable[[GenerativeModel, Tensor], MultivariateNormal]
EncoderBeside = Callable[[GenerativeModel, float, float], nn.Module]


@pytest.fixture
def fitted() -> DenseGaussian:
    """Two Gaussians in three dimensions."""
    root = torch.randn(2, 3, 3)
    covariance = root @ root.mT + 0.1 * torch.eye(3)
    return DenseGaussian(torch.randn(2, 3), torch.linalg.cholesky(covariance))


def test_whitening_is_undone_by_colouring(fitted: DenseGaussian) -> None:
    z = torch.randn(8, 3)
    torch.testing.assert_close(fitted.colour(fitted.whiten(z)), z)
    own = fitted.mean[1] + fitted.factor[1] @ fitted.whiten(z)[4]  # the first chain of the second
    torch.testing.assert_close(own, z[4])


def test_whitened_energy_is_the_posterior_in_other_coordinates(
    model: GenerativeModel, images: Tensor, fitted: DenseGaussian
) -> None:
    rows, w = images[:2].repeat_interleave(4, dim=0), torch.randn(8, 3)
    path = annealed_path(model, rows, fitted)
    path.beta = 1.0
    volume = fitted.factor.det().log().repeat_interleave(4)
    wanted = -model.log_joint(rows, fitted.colour(w)) - volume
    torch.testing.assert_close(path.value_and_gradient(w).energy, wanted)
    path.beta = 0.0
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(w).sum(dim=1)
    torch.testing.assert_close(path.value_and_gradient(w).energy, -standard)


def test_whitened_gradient_is_that_of_the_value(
    model: GenerativeModel, images: Tensor, fitted: DenseGaussian
) -> None:
    rows, w = images[:2].repeat_interleave(4, dim=0), torch.randn(8, 3)
    misfit = WhitenedLikelihood(model.energy(rows), fitted, 4)
    by_autograd = value_and_gradient(lambda point: misfit.value_and_gradient(point).energy, w)
    found = misfit.value_and_gradient(w)
    torch.testing.assert_close(found.energy, by_autograd.energy)
    torch.testing.assert_close(found.gradient, by_autograd.gradient)


def test_fits_have_the_moments_of_the_posteriors(
    linear_gaussian: Model, exact_posterior: ExactPosterior, encoder_beside: EncoderBeside
) -> None:
    model, copies = linear_gaussian(3, 6, 0.5), 400
    x = model.sample(1, seeded_generator("cpu", 1))[0].expand(copies, -1)
    exact = exact_posterior(model, x)
    # Far beside the posterior and far narrower, as trained encoders are.
    start = FittedStart(encoder_beside(model, 2.0, 0.3))
    found = starting_gaussians(model, x, start, 5, 0)
    assert isinstance(found, DenseGaussian)
    error = found.mean - exact.mean
    assert (error.mean(dim=0).abs() < 5 * error.std(dim=0) / copies**0.5).all()
    # Wider by a fifth on purpose; draws are nearer to their own mean than to the posterior's.
    covariance = found.factor @ found.factor.mT
    wanted = 1.2 * (exact.covariance_matrix[0] - error.mT.cov())
    missed = (covariance.mean(dim=0) - wanted).abs()
    assert (missed < 5 * covariance.std(dim=0) / copies**0.5).all()


@pytest.mark.parametrize("fitted", [False, True])
def test_an_encoder_that_has_diverged_is_refused(
    model: GenerativeModel, images: Tensor, fitted: bool
) -> None:
    encoder = Encoder(6, 3, (4,))
    nn.init.constant_(encoder.log_std.bias, torch.nan)
    start = FittedStart(encoder) if fitted else encoder
    with pytest.raises(ValueError, match="is not finite: start at the prior"):
        starting_gaussians(model, images, start, 2, 0)


def test_an_encoder_in_training_mode_is_refused(model: GenerativeModel, images: Tensor) -> None:
    encoder = Encoder(images.shape[1], model.latent_dim, (4,))
    encoder.add_module("dropout", nn.Dropout())
    with pytest.raises(ValueError, match=r"encoder's Dropout is in training mode.*encoder\.eval"):
        encoded(encoder, images)
    encoded(encoder.eval(), images)


def test_fits_depend_on_the_seed_alone(model: GenerativeModel, images: Tensor) -> None:
    start = FittedStart(Encoder(6, 3, (4,)))

    def fit(seed: int) -> DenseGaussian:
        return starting_gaussians(model, images, start, 2, seed)  # type: ignore[return-value]

    first, again, other = fit(1), fit(1), fit(2)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.mean, other.mean)


def test_chains_that_never_move_still_give_a_gaussian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dglm.starts.track_acceptance", lambda *arguments: None)
    monkeypatch.setattr("dglm.starts.HMC", partial(HMC, step_size=1e6))
    # More latent variables than chains, whose draws then span less than the whole space.
    model, images = GenerativeModel(nn.Linear(40, 6), 40), torch.rand(7, 6).round()
    found = starting_gaussians(model, images, FittedStart(Encoder(6, 40, (4,))), 2, 0)
    assert isinstance(found, DenseGaussian)
    assert found.factor.isfinite().all()
    assert (found.factor.diagonal(dim1=1, dim2=2) > 0).all()


def test_gaussians_of_some_images_are_theirs(fitted: DenseGaussian) -> None:
    second = of_images(fitted, slice(1, 2))
    assert isinstance(second, DenseGaussian)
    assert torch.equal(second.mean, fitted.mean[1:])
    assert torch.equal(second.factor, fitted.factor[1:])
