from collections.abc import Callable
from typing import Any

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


class Case:
    """A linear-Gaussian model, images of it and their exact log-likelihood."""

    def __init__(
        self,
        model: GenerativeModel,
        exact_log_likelihood: ExactLogLikelihood,
        encoder_beside: EncoderBeside,
    ) -> None:
        self.model = model
        # Farther and farther out, so that the images are told apart by their bounds.
        pattern = torch.linspace(-1, 1, len(model.decoder.bias))  # type: ignore[arg-type]
        self.x = model.decoder.bias.detach() + torch.arange(4.0)[:, None] * pattern  # type: ignore[operator]
        self.exact = exact_log_likelihood(model, self.x)
        self.encoder_beside = encoder_beside

    def bound(self, factor: float, num_samples: int, seed: int = 0) -> ImportanceResult:
        encoder = self.encoder_beside(self.model, 0.0, factor)
        return importance_weighted_bound(self.model, encoder, self.x, num_samples, seed)


@pytest.fixture
def build_case(
    linear_gaussian: Model,
    exact_log_likelihood: ExactLogLikelihood,
    encoder_beside: EncoderBeside,
) -> Callable[[int], Case]:
    def build(latent_dim: int) -> Case:
        return Case(linear_gaussian(latent_dim, 4, 0.7), exact_log_likelihood, encoder_beside)

    return build


BuildCase = Callable[[int], Case]


def test_bounds_of_the_exact_posterior_are_the_exact_log_likelihood(build_case: BuildCase) -> None:
    case = build_case(1)
    result = case.bound(1.0, 7)
    torch.testing.assert_close(result.log_likelihood, case.exact)
    torch.testing.assert_close(result.effective_sample_size, torch.full((4,), 7.0))
    assert (result.standard_error < 1e-6).all()


@pytest.mark.parametrize("num_samples", [100, 2050])
def test_bounds_agree_with_the_exact_log_likelihood(
    build_case: BuildCase, num_samples: int
) -> None:
    case = build_case(2)
    result = case.bound(1.5, num_samples)
    error = (result.log_likelihood - case.exact).abs()
    assert (result.effective_sample_size > 10).all()
    assert (error < 5 * result.standard_error).all()
    assert (case.exact.diff().abs() > 5 * result.standard_error[1:]).all()


def test_bounds_are_unbiased_on_the_scale_of_the_likelihood(build_case: BuildCase) -> None:
    case, seeds = build_case(2), 200
    ratios = torch.stack(
        [(case.bound(1.5, 5, seed).log_likelihood - case.exact).exp() for seed in range(seeds)]
    )
    assert ((ratios.mean(dim=0) - 1).abs() < 5 * ratios.std(dim=0) / seeds**0.5).all()


def test_standard_errors_are_those_of_independent_runs(build_case: BuildCase) -> None:
    case, seeds = build_case(2), 400
    results = [case.bound(1.5, 150, seed) for seed in range(seeds)]
    spread = torch.stack([result.log_likelihood for result in results]).std(dim=0)
    promised = torch.stack([result.standard_error for result in results]).square().mean(dim=0)
    # The relative error of a standard deviation of 400 numbers is 1/√800.
    torch.testing.assert_close(promised.sqrt(), spread, rtol=5 / 800**0.5, atol=0.0)


def test_error_and_effective_sample_size_are_those_of_the_weights(
    model: GenerativeModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, weights = Encoder(6, 3, (4,)), []
    log_joint = model.log_joint

    def recording(x: Tensor, z: Tensor) -> Tensor:
        mean, log_std = encoder(x)
        q = torch.distributions.Normal(mean, log_std.exp()).log_prob(z).sum(dim=-1)
        weights.append((log_joint(x, z) - q).exp().view(7, 20).detach())
        return log_joint(x, z)

    monkeypatch.setattr(model, "log_joint", recording)
    result = importance_weighted_bound(model, encoder, images, 20)
    (drawn,) = weights
    mean, error = drawn.mean(dim=1), drawn.std(dim=1) / 20**0.5
    torch.testing.assert_close(result.log_likelihood, mean.log())
    torch.testing.assert_close(result.standard_error, error / mean)
    size = drawn.sum(dim=1).square() / drawn.square().sum(dim=1)
    torch.testing.assert_close(result.effective_sample_size, size)


def test_bounds_in_pieces_cover_all_images_in_order(
    build_case: BuildCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build_case(2)
    monkeypatch.setattr("dglm.annealing._MEMORY_BUDGET", 1)
    result = case.bound(1.5, 2000)
    error = (result.log_likelihood - case.exact).abs()
    assert (error < 5 * result.standard_error).all()


@pytest.mark.parametrize("num_samples", [2, 100, 250])
def test_every_weight_is_reported(model: GenerativeModel, images: Tensor, num_samples: int) -> None:
    reported: list[int] = []
    encoder = Encoder(6, 3, (4,))
    importance_weighted_bound(model, encoder, images, num_samples, progress=reported.append)
    assert sum(reported) == 7 * num_samples


def test_the_result_is_a_float64_function_of_the_seed(
    model: GenerativeModel, images: Tensor
) -> None:
    encoder = Encoder(6, 3, (4,)).float()

    def bound(seed: int) -> ImportanceResult:
        torch.seed()
        return importance_weighted_bound(model.float(), encoder, images.float(), 10, seed)

    first, again, other = bound(1), bound(1), bound(2)
    assert {field.dtype for field in first} == {torch.float64}
    assert not any(field.requires_grad for field in first)
    assert torch.equal(first.log_likelihood, again.log_likelihood)
    assert torch.equal(first.effective_sample_size, again.effective_sample_size)
    assert not torch.equal(first.log_likelihood, other.log_likelihood)


class Broken(nn.Module):
    """An encoder whose training has failed."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_full((len(x), 3), torch.nan), x.new_zeros(len(x), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 1}, "num_samples must be at least 2, got 1"),
        ({"images": torch.zeros(2, 5)}, r"flat, \(B, 6\), or images of 6 numbers, got \(2, 5\)"),
        ({"images": torch.full((2, 6), torch.nan)}, "NaN"),
        ({"images": torch.zeros(0, 6)}, "the batch is empty"),
        ({"encoder": Broken()}, r"q\(z\|x\) is not finite"),
    ],
)
def test_impossible_settings_are_refused(
    model: GenerativeModel, images: Tensor, changes: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = {"images": images, "encoder": Encoder(6, 3, (4,)), **changes}
    with pytest.raises(ValueError, match=message):
        importance_weighted_bound(model, **settings)


def test_a_bound_that_rests_on_one_sample_has_no_known_error(build_case: BuildCase) -> None:
    with pytest.warns(UserWarning, match=r"of 4 of 4 images rest on less than two samples"):
        result = build_case(2).bound(1e4, 50)
    assert result.standard_error.isnan().all()


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
