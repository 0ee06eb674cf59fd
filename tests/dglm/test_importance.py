from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dglm import Encoder, GenerativeModel, importance_weighted_bound
from dglm.importance import (
    ImportanceResult,
    log_mean_exp,
    log_mean_standard_error,
    weight_effective_sample_size,
)

pytestmark = pytest.mark.filterwarnings("ignore:the importance-weighted bounds of")

Model = Callable[..., GenerativeModel]
ExactLogLikelihood = Callable[[GenerativeModel, Tensor], Tensor]
EncoderBeside = Callable[[GenerativeModel, float, float], nn.Module]


@pytest.fixture
def bound(
    linear_gaussian: Model, exact_log_likelihood: ExactLogLikelihood, encoder_beside: EncoderBeside
) -> Callable[..., tuple[ImportanceResult, Tensor]]:
    """A function from the width of q and a number of samples to bounds and exact values."""

    def bound(latent_dim: int, width: float, num_samples: int) -> tuple[ImportanceResult, Tensor]:
        model = linear_gaussian(latent_dim, 4, 0.7)
        # Farther and farther out, so that the images are told apart by their bounds.
        x = model.decoder.bias.detach() + torch.arange(4.0)[:, None] * torch.linspace(-1, 1, 4)
        encoder = encoder_beside(model, 0.0, width)
        exact = exact_log_likelihood(model, x)
        return importance_weighted_bound(model, encoder, x, num_samples), exact

    return bound


Bound = Callable[..., tuple[ImportanceResult, Tensor]]


def test_bounds_of_the_exact_posterior_are_the_exact_log_likelihood(bound: Bound) -> None:
    result, exact = bound(1, 1.0, 7)
    torch.testing.assert_close(result.log_likelihood, exact)
    torch.testing.assert_close(result.effective_sample_size, torch.full((4,), 7.0))
    assert (result.standard_error < 1e-6).all()


@pytest.mark.parametrize("budget", [1, 2**30])
def test_bounds_agree_with_the_exact_log_likelihood_also_in_pieces(
    bound: Bound, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dglm.annealing._MEMORY_BUDGET", budget)
    result, exact = bound(2, 1.5, 2050)
    assert (result.effective_sample_size > 10).all()
    assert ((result.log_likelihood - exact).abs() < 5 * result.standard_error).all()
    assert (exact.diff().abs() > 5 * result.standard_error[1:]).all()


def test_pieces_have_noise_of_their_own(
    model: GenerativeModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dglm.annealing._MEMORY_BUDGET", 1)
    same = images[:1].expand(5, -1)
    found = importance_weighted_bound(model, Encoder(6, 3, (4,)), same, 100).log_likelihood
    assert len(found.unique()) == 5


def test_a_bound_that_rests_on_one_sample_has_no_known_error(bound: Bound) -> None:
    with pytest.warns(UserWarning, match=r"of 4 of 4 images rest on less than two samples"):
        result, _ = bound(2, 1e4, 50)
    assert result.standard_error.isnan().all()


@pytest.mark.parametrize("num_samples", [2, 100, 250])
def test_error_and_effective_sample_size_are_those_of_the_weights(
    model: GenerativeModel, images: Tensor, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, weights, reported = Encoder(6, 3, (4,)), [], list[int]()
    log_joint = model.log_joint

    def recording(x: Tensor, z: Tensor) -> Tensor:
        mean, log_std = encoder(x)
        q = torch.distributions.Normal(mean, log_std.exp()).log_prob(z).sum(dim=-1)
        weights.append((log_joint(x, z) - q).exp().view(7, -1).detach())
        return log_joint(x, z)

    monkeypatch.setattr(model, "log_joint", recording)
    result = importance_weighted_bound(
        model, encoder, images, num_samples, progress=reported.append
    )
    assert sum(reported) == 7 * num_samples
    drawn = torch.cat(weights, dim=1)[:, :num_samples]
    mean, error = drawn.mean(dim=1), drawn.std(dim=1) / num_samples**0.5
    torch.testing.assert_close(result.log_likelihood, mean.log())
    known = result.standard_error.isfinite()
    assert known.any() or num_samples == 2
    torch.testing.assert_close(result.standard_error[known], (error / mean)[known])
    size = drawn.sum(dim=1).square() / drawn.square().sum(dim=1)
    torch.testing.assert_close(result.effective_sample_size, size)


def test_bounds_of_a_float32_model_are_float64(model: GenerativeModel, images: Tensor) -> None:
    encoder = Encoder(6, 3, (4,)).float()
    found = importance_weighted_bound(model.float(), encoder, images.float(), 10)
    assert {field.dtype for field in found} == {torch.float64}


# Weights


def test_means_of_weights_neither_overflow_nor_vanish() -> None:
    weights = torch.rand(3, 20)
    for shift in (-1e4, 0.0, 1e4):
        logs = weights.log() + shift
        mean = weights.mean(dim=1)
        torch.testing.assert_close(log_mean_exp(logs), mean.log() + shift)
        error = weights.std(dim=1) / 20**0.5 / mean
        torch.testing.assert_close(log_mean_standard_error(logs), error)
        size = weights.sum(dim=1).square() / weights.square().sum(dim=1)
        torch.testing.assert_close(weight_effective_sample_size(logs), size)


@pytest.mark.parametrize(
    ("logs", "known"),
    [
        ([0.0] * 16, True),
        ([0.0] * 15 + [-800.0], True),  # one chain is lost, the others agree
        ([0.0] * 15 + [4.5], False),  # one chain outweighs all others
        ([-800.0] * 15 + [0.0], False),
        ([4.0 * i for i in range(16)], False),
        ([0.3 * i for i in range(16)], True),
        ([0.0], False),
        ([0.0, 0.1], True),
        ([0.0, 3.0], False),
    ],
)
def test_errors_are_given_where_the_weights_tell_them(logs: list[float], known: bool) -> None:
    error = log_mean_standard_error(torch.tensor([logs]))
    assert bool(error.isfinite()) == known
