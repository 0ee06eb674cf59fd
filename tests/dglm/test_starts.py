from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.covariance import oas
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from dglm import Encoder, FittedStart, GenerativeModel, RefinedStart
from dglm.gaussian import DenseGaussian, UnitMixture, shrunk_covariance
from dglm.starts import Starts, fit_gradients, starting_points
from samplers import HMC, Noise, seeded_generator, value_and_gradient

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
    centres = torch.randn(2, 3, 3)
    path = Starts(fitted, centres, torch.zeros(2, dtype=torch.bool)).path(model, rows)
    volume = fitted.factor.det().log().repeat_interleave(4)
    posterior = -model.log_joint(rows, fitted.colour(w)).detach() - volume
    mixture = MixtureSameFamily(
        Categorical(torch.ones(2, 3)), Independent(Normal(centres, torch.ones(())), 1)
    )
    density = mixture.log_prob(w.view(2, 4, 3).transpose(0, 1)).T.flatten()
    for path.beta, wanted in ((0.0, -density), (1.0, posterior)):
        found = path.value_and_gradient(w)
        torch.testing.assert_close(found.energy, wanted)
        by_autograd = value_and_gradient(lambda point: path.value_and_gradient(point).energy, w)
        torch.testing.assert_close(found.gradient, by_autograd.gradient)


def test_draws_of_a_mixture_take_its_gaussians_in_turn() -> None:
    mixture = UnitMixture(100.0 * torch.arange(32.0).expand(5, -1)[:, :, None], 16)
    draws = mixture.sample(seeded_generator("cpu", 0)).view(5, 16)
    assert ((draws / 100).round().long() // 2 == torch.arange(16)).all()
    many = UnitMixture(torch.tensor([[[-3.0], [3.0]]]), 4000).sample(seeded_generator("cpu", 0))
    assert abs((many - 3 * many.sign()).std() - 1) < 0.1


@pytest.mark.parametrize("from_encoder", [True, False])
def test_fits_have_the_moments_of_the_posteriors(
    linear_gaussian: Model,
    exact_posterior: ExactPosterior,
    encoder_beside: EncoderBeside,
    from_encoder: bool,
) -> None:
    model, copies = linear_gaussian(3, 6, 0.5), 200
    x = model.sample(1, seeded_generator("cpu", 1))[0].expand(copies, -1)
    exact = exact_posterior(model, x)
    # Far beside the posterior and far narrower, as trained encoders are.
    start = FittedStart(encoder_beside(model, 2.0, 0.3) if from_encoder else None)
    found = starting_points(model, x, start, 5, 0)
    fitted = found.gaussians
    assert isinstance(fitted, DenseGaussian)
    assert not found.missed_modes.any()
    assert torch.allclose(found.centres, torch.zeros(()), atol=1e-9)  # one mode, one Gaussian
    error = fitted.mean - exact.mean
    assert (error.mean(dim=0).abs() < 5 * error.std(dim=0) / copies**0.5).all()
    # Wider by a fifth on purpose; draws are nearer to their own mean than to the posterior's.
    covariance = fitted.factor @ fitted.factor.mT
    wanted = 1.2 * (exact.covariance_matrix[0] - error.mT.cov())
    missed = (covariance.mean(dim=0) - wanted).abs()
    assert (missed < 5 * covariance.std(dim=0) / copies**0.5).all()


def test_long_narrow_posteriors_are_one_mode(
    linear_gaussian: Model, encoder_beside: EncoderBeside
) -> None:
    model = linear_gaussian(50, 60, 0.1)
    with torch.no_grad():  # standard deviations from 1 to 0.04, for which steps are short
        left, _, right = torch.linalg.svd(model.decoder.weight, full_matrices=False)
        model.decoder.weight.copy_(left * torch.logspace(-3, 0.4, 50) @ right)
    images = model.sample(8, seeded_generator("cpu", 0))[0]
    start, gradients = FittedStart(encoder_beside(model, 0.0, 1.0)), list[int]()
    found = starting_points(model, images, start, 5, 0, gradients.append)
    assert sum(gradients) == fit_gradients(8, 50, start, 5)
    assert not found.missed_modes.any()
    assert found.centres.abs().max() < 1e-9


def test_covariances_are_shrunk_as_scikit_learn_shrinks_them() -> None:
    draws = torch.randn(3, 40, 6, dtype=torch.float64) @ torch.rand(6, 6, dtype=torch.float64)
    for own, found in zip(draws, shrunk_covariance(draws), strict=True):
        wanted, share = oas(own.numpy())
        assert 0.01 < share < 0.9
        torch.testing.assert_close(found, torch.from_numpy(wanted))


def test_refined_gaussians_have_the_moments_of_the_posteriors(
    linear_gaussian: Model, exact_posterior: ExactPosterior
) -> None:
    model, copies = linear_gaussian(3, 6, 0.5), 200
    x = model.sample(1, seeded_generator("cpu", 1))[0].expand(copies, -1)
    exact = exact_posterior(model, x)
    askew = torch.tensor([[1.3, 0.0, 0.0], [0.4, 1.0, 0.0], [-0.3, 0.5, 0.8]])
    given = exact.scale_tril[:1] @ askew
    network = nn.Module()
    network.forward = (
        lambda x: DenseGaussian(  # type: ignore[method-assign]
            exact.mean[: len(x)] + exact.stddev[: len(x)], given.expand(len(x), -1, -1)
        )
    )
    fitted = starting_points(model, x, RefinedStart(network), 5, 0).gaussians
    assert isinstance(fitted, DenseGaussian)
    error = fitted.mean - exact.mean
    assert (error.mean(dim=0).abs() < 5 * error.std(dim=0) / copies**0.5).all()
    # Between those of the draws and a sphere in the given coordinates, as many draws decide.
    covariance = torch.linalg.inv(given) @ fitted.factor @ fitted.factor.mT / 1.2
    covariance = covariance @ torch.linalg.inv(given).mT
    wanted = torch.linalg.inv(given) @ exact.covariance_matrix[0] @ torch.linalg.inv(given).mT
    sphere = wanted.diagonal(dim1=1, dim2=2).mean() * torch.eye(3)
    away = (covariance - sphere).flatten(1) @ (wanted - sphere).flatten()
    share = away / (wanted - sphere).square().sum()
    assert 0.7 < share.mean() < 0.99
    assert (share.std() / copies**0.5) < 0.02
    assert error.std() < 0.3 * exact.stddev.mean()


def test_chains_that_never_move_still_give_a_gaussian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dglm.annealing._PILOT_GAIN", 0.0)
    noise = HMC.noise

    def pushing(kernel: HMC, *given: Any) -> Noise:
        drawn = noise(kernel, *given)
        return drawn._replace(momentum=1e6 * drawn.momentum)

    monkeypatch.setattr(HMC, "noise", pushing)
    # More latent variables than chains, whose draws then span less than the whole space.
    model, images = GenerativeModel(nn.Linear(40, 6), 40), torch.rand(7, 6).round()
    found = starting_points(model, images, FittedStart(Encoder(6, 40, (4,))), 2, 0).gaussians
    assert isinstance(found, DenseGaussian)
    assert found.factor.isfinite().all()
    assert (found.factor.diagonal(dim1=1, dim2=2) > 0).all()
