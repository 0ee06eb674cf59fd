"""Annealed importance sampling and BDMC from every start, against exact evidence."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dglm import (
    AISResult,
    AISSettings,
    Decoder,
    Encoder,
    FittedStart,
    Gaussian,
    GenerativeModel,
    bidirectional_bounds,
    estimate_log_likelihood,
)
from dglm.ais import gather, join
from dglm.annealing import Annealed, anneal
from samplers import HMC, seeded_generator

Model = Callable[..., GenerativeModel]
ExactLogLikelihood = Callable[[GenerativeModel, Tensor], Tensor]
EncoderBeside = Callable[[GenerativeModel, float, float], nn.Module]
Start = Callable[[GenerativeModel], Any]

FEW = AISSettings(num_chains=4, num_temperatures=5, num_leapfrogs=2)

# Where weights or temperatures are few on purpose; what is said of them is tested below.
pytestmark = pytest.mark.filterwarnings("ignore:the log-likelihoods of")


@pytest.fixture(params=["prior", "encoder", "fitted from an encoder", "fitted"])
def start(request: pytest.FixtureRequest, encoder_beside: EncoderBeside) -> Start:
    """A builder of each of the four starts."""

    def build(model: GenerativeModel) -> Any:
        encoder = encoder_beside(model, 0.5, 1.3)
        others = {"encoder": encoder, "fitted from an encoder": FittedStart(encoder)}
        return others.get(request.param, request.param)

    return build


def draw(model: GenerativeModel, count: int) -> Tensor:
    return model.sample(count, seeded_generator("cpu", 1))[0]


# Against the exact evidence


@pytest.mark.parametrize(("latent_dim", "pixels", "noise"), [(1, 3, 1.0), (2, 5, 0.3), (6, 9, 1.0)])
def test_estimates_agree_with_the_exact_log_likelihood(
    linear_gaussian: Model,
    exact_log_likelihood: ExactLogLikelihood,
    start: Start,
    latent_dim: int,
    pixels: int,
    noise: float,
) -> None:
    model = linear_gaussian(latent_dim, pixels, noise)
    x = draw(model, 5)
    result = estimate_log_likelihood(model, x, AISSettings(200), start(model))
    error = (result.log_likelihood - exact_log_likelihood(model, x)).abs()
    assert (error < 5 * result.standard_error).all()
    assert (result.standard_error < 0.3).all()
    assert not result.missed_modes.any()


def test_estimates_of_the_likelihood_are_unbiased_at_few_temperatures(
    linear_gaussian: Model, exact_log_likelihood: ExactLogLikelihood, start: Start
) -> None:
    model, copies = linear_gaussian(2, 4, 1.0), 600
    x = draw(model, 2).repeat_interleave(copies, dim=0)
    result = estimate_log_likelihood(model, x, FEW, start(model))
    ratios = (result.log_likelihood - exact_log_likelihood(model, x)).exp().view(2, copies)
    errors = ratios.std(dim=1) / copies**0.5
    assert ((ratios.mean(dim=1) - 1).abs() < 5 * errors).all()
    assert (errors < 0.1).all()


def test_standard_errors_are_those_of_independent_runs(linear_gaussian: Model) -> None:
    model = linear_gaussian(2, 4, 1.0)
    x = draw(model, 1).expand(400, -1)
    result = estimate_log_likelihood(model, x, AISSettings(50, 10, 2), "prior")
    spread = result.log_likelihood.std()
    promised = result.standard_error.square().mean().sqrt()
    # The relative error of a standard deviation of 400 numbers is 1/√800, tails aside.
    assert promised == pytest.approx(float(spread), rel=0.2)


class Growing(nn.Module):
    """The posterior's width falls with z, from 0.6 to 0.04."""

    def forward(self, z: Tensor) -> Tensor:
        return z.exp() * torch.tensor([1.0, -0.8, 1.3, 0.6])


class Fold(nn.Module):
    """z and -z give the same image."""

    def forward(self, z: Tensor) -> Tensor:
        return (z.square() + 0.01).sqrt() * torch.tensor([1.5, -0.3, -2.2, 0.6])


class Constant(nn.Module):
    """q(z|x) is the same for all images."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.new_full((len(x), 1), self.mean)
        return mean, torch.full_like(mean, math.log(self.std))


def on_a_line(model: GenerativeModel, x: Tensor) -> Tensor:
    """Return log p(x) of models of one latent variable."""
    z = torch.linspace(-8, 8, 16_001)[:, None]
    sums = [model.log_joint(each.expand(len(z), -1), z).logsumexp(dim=0) for each in x]
    return torch.stack(sums) + math.log(1e-3)


@torch.no_grad()
@pytest.mark.parametrize("start", ["prior", "fitted"])
def test_each_image_has_step_sizes_of_its_own(start: Any) -> None:
    model = GenerativeModel(Growing(), 1, Gaussian(0.3))
    x = model.likelihood.sample(model.decoder(torch.linspace(-1.5, 1.5, 40)[:, None]))
    result = estimate_log_likelihood(model, x, AISSettings(16, 400, 5), start)
    error = result.log_likelihood - on_a_line(model, x)
    assert (result.acceptance > 0.5).all()
    assert (error.abs() < 5 * result.standard_error + 0.01).all()
    assert result.standard_error.mean() < 0.25


@torch.no_grad()
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_a_mode_that_the_encoder_misses_is_found_and_told_of(offset: float) -> None:
    fold = nn.Sequential(Fold())
    fold.register_forward_pre_hook(lambda _, arguments: (arguments[0] + offset,))  # unequal modes
    model = GenerativeModel(fold, 1, Gaussian(0.15))
    x = model.likelihood.sample(model.decoder(torch.randn(30, 1).abs() + 0.9))
    exact, one, both = on_a_line(model, x), Constant(1.2, 0.3), Constant(0.0, 2.0)
    with pytest.warns(UserWarning, match=r"misses a mode .* of \d+ of 30 images \(.*\), which"):
        result = estimate_log_likelihood(model, x, start=FittedStart(one))
    assert result.missed_modes.float().mean() > 0.9
    for found in (result, *(estimate_log_likelihood(model, x, start=s) for s in ("fitted",))):
        error = found.log_likelihood - exact
        assert (error.abs() < 5 * found.standard_error).all()
        assert found.standard_error.mean() < 0.3
    assert not estimate_log_likelihood(model, x, start=FittedStart(both)).missed_modes.any()


def test_a_chain_far_above_the_posterior_does_not_widen_the_start() -> None:
    class Trap(nn.Module):  # a second mode with a mass of e^-24
        def forward(self, z: Tensor) -> Tensor:
            return torch.where(z < 6, z, 9.0 - z + 0.5 * (z - 6))

    model = GenerativeModel(Trap(), 1, Gaussian(0.2))
    x = torch.full((20, 1), 1.0)
    with pytest.warns(UserWarning, match="misses a mode"):
        result = estimate_log_likelihood(model, x, start=FittedStart(Constant(11.0, 0.5)))
    assert (result.effective_sample_size > 10).all()


# What the result rests on


def test_images_whose_error_is_unknown_are_named() -> None:
    torch.manual_seed(0)
    wide = GenerativeModel(nn.Linear(8, 12), 8, Gaussian(0.05))
    x = torch.cat([draw(wide, 3), draw(wide, 1)])
    with pytest.warns(UserWarning, match=r"of 4 of 4 images \(0, 1, 2, 3\) rest on less than two"):
        poor = estimate_log_likelihood(wide, x, AISSettings(16, 3, 2), "prior")
    assert poor.unreliable.all()
    assert poor.standard_error.isnan().all()
    assert poor.log_likelihood.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = estimate_log_likelihood(wide, x)
    assert not good.unreliable.any()


def test_chains_that_do_not_move_have_no_known_error(
    linear_gaussian: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dglm.annealing._PILOT_GAIN", 0.0)
    monkeypatch.setattr("dglm.annealing.HMC", lambda leapfrogs: HMC(leapfrogs))
    model, step = linear_gaussian(2, 4, 1.0), HMC.step

    def rejecting(kernel: HMC, state: Any, energy: Any, noise: Any, context: Any = None) -> Any:
        return step(kernel, state, energy, noise._replace(momentum=1e4 * noise.momentum), context)

    monkeypatch.setattr(HMC, "step", rejecting)
    with pytest.warns(UserWarning, match="or on chains that hardly move"):
        result = estimate_log_likelihood(model, draw(model, 2), FEW, "prior")
    assert result.unreliable.all()


def test_acceptance_is_near_its_target(linear_gaussian: Model, start: Start) -> None:
    model = linear_gaussian(3, 8, 0.3)
    result = estimate_log_likelihood(model, draw(model, 4), AISSettings(100, 60, 3), start(model))
    assert ((result.acceptance - 0.65).abs() < 0.15).all()


def test_the_result_is_a_function_of_the_seed(linear_gaussian: Model, start: Start) -> None:
    model = linear_gaussian()
    x, begin = draw(model, 3), start(model)

    def estimate(seed: int) -> Tensor:
        torch.seed()
        return estimate_log_likelihood(model, x, replace(FEW, seed=seed), begin).log_weights

    assert torch.equal(estimate(1), estimate(1))
    assert not torch.equal(estimate(1), estimate(2))


def test_step_sizes_are_frozen_and_those_of_both_directions(
    linear_gaussian: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = linear_gaussian(2, 4, 0.3), []

    def recording(*arguments: Any) -> Annealed:
        betas, step_sizes = arguments[2], arguments[4].clone()
        found = anneal(*arguments)
        assert torch.equal(arguments[4], step_sizes)
        given.append((betas, step_sizes))
        return found

    monkeypatch.setattr("dglm.ais.anneal", recording)
    bidirectional_bounds(model, 3, AISSettings(4, 9, 2), "prior")
    (betas, forward), (reversed_betas, reverse) = given
    assert torch.equal(betas, reversed_betas.flip(0))
    assert torch.equal(forward, reverse.flip(0))
    assert not torch.equal(forward, reverse)


@pytest.mark.parametrize("num_temperatures", [1, 2, 7])
def test_gradient_evaluations_are_counted_and_reported(
    model: GenerativeModel, images: Tensor, gradients: list[int], num_temperatures: int
) -> None:
    settings = AISSettings(3, num_temperatures, 2)
    for begin in ("prior", "fitted", FittedStart(Encoder(6, 3, (4,))), Encoder(6, 3, (4,))):
        gradients.clear()
        reported: list[int] = []
        result = estimate_log_likelihood(model, images, settings, begin, reported.append)  # type: ignore[arg-type]
        assert result.gradient_evaluations == sum(gradients) == sum(reported)
    gradients.clear()
    reported = []
    bounds = bidirectional_bounds(model, 5, settings, "prior", reported.append)
    assert bounds.gradient_evaluations == sum(gradients) == sum(reported)


def test_weights_are_float64_for_a_float32_model(model: GenerativeModel, images: Tensor) -> None:
    result = estimate_log_likelihood(model.float(), images.float(), FEW)
    assert result.log_weights.dtype == result.log_likelihood.dtype == torch.float64
    assert result.log_weights.shape == (7, 4)


def test_log_likelihood_and_its_error_follow_from_the_weights(
    model: GenerativeModel, images: Tensor
) -> None:
    result = estimate_log_likelihood(model, images, AISSettings(50, 1, 2))
    weights = result.log_weights.exp()
    mean, error = weights.mean(dim=1), weights.std(dim=1) / 50**0.5
    torch.testing.assert_close(result.log_likelihood, mean.log())
    torch.testing.assert_close(result.standard_error, error / mean)
    size = weights.sum(dim=1).square() / weights.square().sum(dim=1)
    torch.testing.assert_close(result.effective_sample_size, size)


def test_estimates_in_pieces_cover_all_images_in_order(
    linear_gaussian: Model,
    exact_log_likelihood: ExactLogLikelihood,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dglm.annealing._MEMORY_BUDGET", 1)
    model = linear_gaussian(2, 4, 1.0)
    # Farther and farther out, so that they differ by more than the error of an estimate.
    bias = model.decoder.bias.detach()
    x = bias + torch.tensor([0.0, 1, 2, 3, 3])[:, None] * torch.tensor([1.0, -1.0, 0.5, 0.5])
    result = estimate_log_likelihood(model, x, AISSettings(200, 60, 3), start(model))
    exact = exact_log_likelihood(model, x)
    assert ((result.log_likelihood - exact).abs() < 5 * result.standard_error).all()
    assert (exact[:4].diff().abs() > 5 * result.standard_error[1:4]).all()
    assert len(set(result.log_weights.flatten().tolist())) == 1000  # noise of its own for each


def test_estimates_work_in_inference_mode(model: GenerativeModel, images: Tensor) -> None:
    expected = estimate_log_likelihood(model, images, FEW)
    with torch.inference_mode():
        found = estimate_log_likelihood(model, images, FEW)
    torch.testing.assert_close(found.log_weights, expected.log_weights)


def test_nothing_is_left_on_the_model(model: GenerativeModel, images: Tensor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = estimate_log_likelihood(model, images, FEW)
    assert not result.log_weights.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Bounds from both sides


def exact_of_simulated(
    model: GenerativeModel, exact: ExactLogLikelihood, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Tensor]:
    """Return the exact log-likelihoods of the images that the model simulates next."""
    sample, drawn = model.sample, []
    monkeypatch.setattr(model, "sample", lambda *given: drawn.append(sample(*given)) or drawn[-1])
    return lambda: exact(model, drawn[-1][0])


def standard_errors(difference: Tensor) -> float:
    return float(difference.mean() / (difference.std() / len(difference) ** 0.5))


def test_bounds_enclose_the_exact_log_likelihood_and_are_unbiased_on_its_scale(
    linear_gaussian: Model,
    exact_log_likelihood: ExactLogLikelihood,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = linear_gaussian(2, 4, 1.0)
    exact = exact_of_simulated(model, exact_log_likelihood, monkeypatch)
    bounds = bidirectional_bounds(model, 600, AISSettings(2, 3, 2), start(model))
    lower, upper = exact() - bounds.lower, bounds.upper - exact()
    assert min(standard_errors(lower), standard_errors(upper)) > -5
    assert abs(standard_errors((-lower).exp() - 1)) < 5
    assert abs(standard_errors((-upper).exp() - 1)) < 5


def test_the_gap_closes_with_more_temperatures(linear_gaussian: Model) -> None:
    model = linear_gaussian(3, 6, 0.5)
    loose, tight = (
        bidirectional_bounds(model, 200, AISSettings(2, count, 2), "prior") for count in (4, 40)
    )
    assert loose.gap > 5 * loose.gap_standard_error
    error = math.hypot(loose.gap_standard_error, tight.gap_standard_error)
    assert loose.gap - tight.gap > 5 * error


@pytest.mark.slow
@pytest.mark.parametrize("num_leapfrogs", [3, 5, 6])
def test_no_number_of_leapfrogs_resonates(linear_gaussian: Model, num_leapfrogs: int) -> None:
    settings = AISSettings(16, 300, num_leapfrogs)
    bounds = bidirectional_bounds(linear_gaussian(3, 5, 0.5), 400, settings, "prior")
    assert bounds.gap < 0.03 + 5 * bounds.gap_standard_error
    assert bounds.gap_standard_error < 0.02


def test_the_gap_and_its_error_are_over_images(model: GenerativeModel) -> None:
    bounds = bidirectional_bounds(model, 5, AISSettings(3, 4, 1))
    difference = bounds.upper - bounds.lower
    assert difference.shape == (5,)
    assert bounds.gap == pytest.approx(float(difference.mean()))
    assert bounds.gap_standard_error == pytest.approx(float(difference.std() / 5**0.5))


class Ramp(nn.Module):
    """A decoder without parameters."""

    def forward(self, z: Tensor) -> Tensor:
        return z.sum(dim=-1, keepdim=True) * torch.linspace(-1, 1, 6)


def test_a_decoder_needs_no_parameters() -> None:
    assert bidirectional_bounds(GenerativeModel(Ramp(), 2), 3, FEW).lower.isfinite().all()


@pytest.mark.parametrize("num_images", [1, 0])
def test_one_image_has_no_error_bar(model: GenerativeModel, num_images: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 for an error bar, got {num_images}"):
        bidirectional_bounds(model, num_images)


# Shares of several processes


def part_of(result: AISResult, images: slice) -> AISResult:
    fields = (field[images] for field in result[:5])
    return AISResult(*fields, gradient_evaluations=len(range(7)[images]))


def test_consecutive_results_are_joined(model: GenerativeModel, images: Tensor) -> None:
    whole = estimate_log_likelihood(model, images, FEW)
    parts = [part_of(whole, slice(0, 3)), part_of(whole, slice(3, 7))]
    for joined in (join(parts), gather(parts)):  # this process is the only one
        assert all(map(torch.equal, joined[:1] + joined[2:5], whole[:1] + whole[2:5]))
        assert joined.gradient_evaluations == 7


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_shares_of_processes_are_put_in_the_order_of_the_images(
    model: GenerativeModel, images: Tensor, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = estimate_log_likelihood(model, images, FEW)
    shares = [
        [part_of(whole, slice(rank, None, world_size))] if rank < len(images) else []
        for rank in range(world_size)
    ]

    def all_gather_object(results: list[list[AISResult]], own: list[AISResult]) -> None:
        assert own is shares[-1]
        results[:] = shares

    for name, replacement in {
        "is_initialized": lambda: True,
        "get_world_size": lambda: world_size,
        "all_gather_object": all_gather_object,
    }.items():
        monkeypatch.setattr(torch.distributed, name, replacement)
    gathered = gather(shares[-1])
    assert all(map(torch.equal, gathered[:1] + gathered[2:5], whole[:1] + whole[2:5]))
    assert gathered.gradient_evaluations == 7


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "posterior"}, "start must be 'prior', 'fitted', FittedStart or an encoder"),
        ({"images": torch.full((2, 6), torch.nan)}, "2 of 2 observations hold NaN"),
        ({"images": torch.full((2, 6), 255.0)}, r"in \[0, 1\]"),
        ({"images": torch.zeros(2, 5)}, r"flat, \(B, 6\), or images of 6 numbers, got \(2, 5\)"),
        ({"images": torch.zeros(0, 6)}, "the batch is empty"),
    ],
)
def test_what_cannot_be_estimated_is_refused(
    model: GenerativeModel, images: Tensor, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_log_likelihood(model, **{"images": images, "settings": FEW, **changes})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_chains", 0, "must be at least 1, got 0"),
        ("num_temperatures", 0, "must be at least 1, got 0"),
        ("num_leapfrogs", 0, "must be at least 1, got 0"),
        ("seed", -1, "must be 0 or more, got -1"),
    ],
)
def test_impossible_settings_are_refused(name: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name} {message}"):
        AISSettings(**{name: value})


def test_one_chain_has_no_standard_error(model: GenerativeModel, images: Tensor) -> None:
    result = estimate_log_likelihood(model, images, AISSettings(1, 1, 1))
    assert result.log_likelihood.isfinite().all()
    assert result.standard_error.isnan().all()


@pytest.mark.parametrize("begin", ["prior", "fitted"])
def test_a_compiled_transition_gives_the_same_weights(begin: Any) -> None:
    model = GenerativeModel(Decoder(2, 8, [5]), 2)
    images, _ = model.sample(3, seeded_generator("cpu", 0))
    eager = estimate_log_likelihood(model, images, FEW, begin)
    with warnings.catch_warnings():  # where there is no compiler, the estimate is the eager one
        warnings.filterwarnings("ignore", "torch.compile does not work here")
        compiled = estimate_log_likelihood(model, images, replace(FEW, compile=True), begin)
    torch.testing.assert_close(compiled.log_weights, eager.log_weights, rtol=1e-9, atol=1e-9)
