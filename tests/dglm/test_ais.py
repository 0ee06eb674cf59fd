"""Annealed importance sampling and BDMC from every start, where log p(x) is known."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial, partialmethod
from typing import Any, NamedTuple

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
    GaussianNetwork,
    GenerativeModel,
    RefinedStart,
    bidirectional_bounds,
    estimate_log_likelihood,
)
from dglm.ais import gather
from dglm.annealing import Annealed, Tuned, anneal, tune_step_sizes
from dglm.gaussian import DenseGaussian
from dglm.importance import log_mean_exp, weight_effective_sample_size
from samplers import HMC, seeded_generator

Model = Callable[..., GenerativeModel]
ExactLogLikelihood = Callable[[GenerativeModel, Tensor], Tensor]
EncoderBeside = Callable[[GenerativeModel, float, float], nn.Module]
Start = Callable[[GenerativeModel], Any]

FEW = AISSettings(num_chains=4, num_temperatures=5, num_leapfrogs=2)

SLOW = pytest.mark.slow

# Where weights or temperatures are few on purpose; what is said of them is tested below.
pytestmark = pytest.mark.filterwarnings("ignore:the log-likelihoods of")


class Constant(nn.Module):
    """q(z|x) is the same for all images."""

    def __init__(self, mean: float, std: float, latent_dim: int = 1) -> None:
        super().__init__()
        self.mean, self.std, self.latent_dim = mean, std, latent_dim

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.new_full((len(x), self.latent_dim), self.mean)
        return mean, torch.full_like(mean, math.log(self.std))


class Dense(nn.Module):
    """The q(z|x) of an encoder with a dense covariance."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> DenseGaussian:
        mean, log_std = self.encoder(x)
        return DenseGaussian(mean, torch.diag_embed(log_std.exp()))


@pytest.fixture(params=["prior", "encoder", "coordinates", "fitted from an encoder", "fitted"])
def start(request: pytest.FixtureRequest, encoder_beside: EncoderBeside) -> Start:
    """A builder of each of the five starts."""

    def build(model: GenerativeModel) -> Any:
        linear = isinstance(model.decoder, nn.Linear)
        if request.param == "coordinates":
            pixels = model.sample(1)[0].shape[1]
            network = GaussianNetwork(pixels, model.latent_dim, (4,))
            nn.init.normal_(network.output.bias, std=0.3)
            return RefinedStart(network)
        wide = Constant(0.4, 0.9, model.latent_dim)
        encoder = encoder_beside(model, 0.5, 1.3) if linear else wide
        others = {"encoder": encoder, "fitted from an encoder": FittedStart(encoder)}
        return others.get(request.param, request.param)

    return build


class Case(NamedTuple):
    """A model whose log p(x) is known."""

    model: GenerativeModel
    exact: Callable[[Tensor], Tensor]


SIZES = {"linear": (2, 4, 1.0), "narrow": (2, 5, 0.3), "of six": (6, 9, 1.0)}
BENT = {"bent": 1, "bent in the plane": 2}


@pytest.fixture(params=["narrow", "of six", *BENT])
def case(
    request: pytest.FixtureRequest,
    linear_gaussian: Model,
    exact_log_likelihood: ExactLogLikelihood,
    on_a_grid: ExactLogLikelihood,
) -> Case:
    """Linear-Gaussian models; decoders so bent that posteriors are skewed or have two modes."""
    if request.param in SIZES:
        model, exact = linear_gaussian(*SIZES[request.param]), exact_log_likelihood
    else:
        dim = BENT[request.param]
        model, exact = GenerativeModel(Decoder(dim, 8, (6,)), dim), on_a_grid
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=1.5)
    return Case(model, partial(exact, model))


def draw(model: GenerativeModel, count: int) -> Tensor:
    return model.sample(count, seeded_generator("cpu", 1))[0]


def test_a_grid_sums_to_one_over_all_images(on_a_grid: ExactLogLikelihood) -> None:
    model = GenerativeModel(Decoder(2, 3, (6,)), 2)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    assert float(on_a_grid(model, images).exp().sum()) == pytest.approx(1, abs=1e-9)


# Against the exact evidence


def test_estimates_agree_with_the_exact_log_likelihood(case: Case, start: Start) -> None:
    x = draw(case.model, 5)
    result = estimate_log_likelihood(case.model, x, AISSettings(200), start(case.model))
    error = (result.log_likelihood - case.exact(x)).abs()
    assert (error < 5 * result.standard_error).all()
    assert (result.standard_error < 0.3).all()
    assert ((result.acceptance - 0.65).abs() < 0.25).all()


@pytest.mark.parametrize("case", ["linear", pytest.param("bent", marks=SLOW)], indirect=True)
def test_estimates_of_the_likelihood_are_unbiased_at_few_temperatures(
    case: Case, start: Start
) -> None:
    x, copies = draw(case.model, 2), 400
    rows = x.repeat_interleave(copies, dim=0)
    result = estimate_log_likelihood(case.model, rows, FEW, start(case.model))
    ratios = (result.log_likelihood.view(2, copies) - case.exact(x)[:, None]).exp()
    errors = ratios.std(dim=1) / copies**0.5
    assert ((ratios.mean(dim=1) - 1).abs() < 5 * errors).all()
    assert (errors < 0.12).all()


def test_standard_errors_are_those_of_independent_runs(linear_gaussian: Model) -> None:
    model = linear_gaussian(2, 4, 1.0)
    x = draw(model, 1).expand(400, -1)
    result = estimate_log_likelihood(model, x, AISSettings(50, 40, 2), "prior")
    spread = result.log_likelihood.std()
    promised = result.standard_error.square().mean().sqrt()
    # The relative error of a standard deviation of 400 numbers is 1/√800, tails aside. With fewer
    # temperatures some rest on less than two chains, and have no error.
    assert promised == pytest.approx(float(spread), rel=0.2)


class Growing(nn.Module):
    """The posterior's width falls with z, from 0.6 to 0.04."""

    def forward(self, z: Tensor) -> Tensor:
        return z.exp() * torch.tensor([1.0, -0.8, 1.3, 0.6])


class Fold(nn.Module):
    """z and -z give the same image."""

    def forward(self, z: Tensor) -> Tensor:
        return (z.square() + 0.01).sqrt() * torch.tensor([1.5, -0.3, -2.2, 0.6])


@torch.no_grad()
@pytest.mark.parametrize(("start", "num_temperatures"), [("prior", 400), ("fitted", 60)])
def test_each_image_has_step_sizes_of_its_own(
    start: Any,
    num_temperatures: int,
    on_a_grid: ExactLogLikelihood,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In pieces of ten images, so that each must find its own among those of all.
    monkeypatch.setattr("dglm.annealing._bytes_per_chain", lambda *_: 1)
    monkeypatch.setattr("dglm.annealing._MEMORY_BUDGET", 160)
    model = GenerativeModel(Growing(), 1, Gaussian(0.3))
    x = model.likelihood.sample(model.decoder(torch.linspace(-1.5, 1.5, 24)[:, None]))
    result = estimate_log_likelihood(model, x, AISSettings(16, num_temperatures, 5), start)
    error = result.log_likelihood - on_a_grid(model, x)
    assert (result.acceptance > 0.5).all()
    assert (error.abs() < 5 * result.standard_error + 0.01).all()
    assert result.standard_error.mean() < 0.25


@torch.no_grad()
def test_a_mode_that_the_encoder_misses_is_found_and_told_of(on_a_grid: ExactLogLikelihood) -> None:
    fold = nn.Sequential(Fold())
    fold.register_forward_pre_hook(lambda _, arguments: (arguments[0] + 0.1,))  # unequal modes
    model = GenerativeModel(fold, 1, Gaussian(0.15))
    x = model.likelihood.sample(model.decoder(torch.randn(20, 1).abs() + 0.9))
    exact, one, both = on_a_grid(model, x), Constant(1.2, 0.3), Constant(0.0, 2.0)
    few = AISSettings(16, 40)
    with pytest.warns(UserWarning, match=r"misses a mode .* of \d+ of 20 images \(.*\), which"):
        result = estimate_log_likelihood(model, x, few, FittedStart(one))
    assert result.missed_modes.float().mean() > 0.9
    for found in (result, estimate_log_likelihood(model, x, few, "fitted")):
        error = found.log_likelihood - exact
        assert (error.abs() < 5 * found.standard_error).all()
        assert found.standard_error.mean() < 0.3
    for alone in (one, RefinedStart(Dense(one))):
        with pytest.warns(UserWarning, match=r"misses a mode .* of \d of 20 images \(0, "):
            low = estimate_log_likelihood(model, x, few, alone)
        assert 3 <= low.missed_modes.sum() <= 5  # of five that are looked at
        assert low.unreliable[low.missed_modes].all()
        assert (low.log_likelihood - exact).mean() < -0.3
    for begin in (FittedStart(both), both):
        assert not estimate_log_likelihood(model, x, few, begin).missed_modes.any()


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


@pytest.mark.parametrize(("latent_dim", "pixels"), [(6, 9), (20, 30)])
def test_errors_are_known_where_estimates_are_right_and_unknown_where_they_are_not(
    linear_gaussian: Model, exact_log_likelihood: ExactLogLikelihood, latent_dim: int, pixels: int
) -> None:
    model = linear_gaussian(latent_dim, pixels, 0.3)
    x = draw(model, 60)
    settings, exact = AISSettings(16, 10, 3), exact_log_likelihood(model, x)
    poor = estimate_log_likelihood(model, x, settings, "prior")
    low = poor.log_likelihood < exact - 2
    assert low.float().mean() > 0.5
    assert poor.unreliable[low].all()
    good = estimate_log_likelihood(model, x, settings)
    assert not good.unreliable.any()
    assert ((good.log_likelihood - exact).abs() < 5 * good.standard_error).all()


def test_chains_that_do_not_move_have_no_known_error(
    linear_gaussian: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dglm.annealing._PILOT_GAIN", 0.0)
    model, step = linear_gaussian(2, 4, 1.0), HMC.step

    def rejecting(kernel: HMC, state: Any, energy: Any, noise: Any, context: Any = None) -> Any:
        return step(kernel, state, energy, noise._replace(momentum=1e4 * noise.momentum), context)

    monkeypatch.setattr(HMC, "step", rejecting)
    with pytest.warns(UserWarning, match="or on chains that hardly move"):
        result = estimate_log_likelihood(model, draw(model, 2), FEW, "prior")
    assert result.unreliable.all()


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


@pytest.mark.parametrize("num_temperatures", [1, 7])
def test_gradient_evaluations_are_counted_and_reported(
    model: GenerativeModel, images: Tensor, gradients: list[int], num_temperatures: int
) -> None:
    settings = AISSettings(3, num_temperatures, 2)
    encoder = Encoder(6, 3, (4,))
    starts = "prior", "fitted", FittedStart(encoder), encoder, RefinedStart(Dense(encoder))
    for begin in starts:
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
    assert torch.equal(result.log_likelihood, log_mean_exp(result.log_weights))
    size = weight_effective_sample_size(result.log_weights)
    assert torch.equal(result.effective_sample_size, size)


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
    x = bias + torch.tensor([0.0, 2, 3, 3])[:, None] * torch.tensor([1.0, -1.0, 0.5, 0.5])
    result = estimate_log_likelihood(model, x, AISSettings(200, 30, 2), start(model))
    exact = exact_log_likelihood(model, x)
    assert ((result.log_likelihood - exact).abs() < 5 * result.standard_error).all()
    assert (exact[:3].diff().abs() > 5 * result.standard_error[1:3]).all()
    assert result.log_weights.unique().numel() == 800  # noise of its own for each


# Bounds from both sides


def standard_errors(difference: Tensor) -> float:
    return float(difference.mean() / (difference.std() / len(difference) ** 0.5))


@pytest.mark.parametrize("case", ["linear", "bent"], indirect=True)
def test_bounds_enclose_the_exact_log_likelihood_and_are_unbiased_on_its_scale(
    case: Case, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, drawn = case.model.sample, []
    monkeypatch.setattr(
        case.model, "sample", lambda *given: drawn.append(sample(*given)) or drawn[-1]
    )
    bounds = bidirectional_bounds(case.model, 400, AISSettings(4, 12, 2), start(case.model))
    exact = case.exact(drawn[-1][0])
    lower, upper = exact - bounds.lower, bounds.upper - exact
    assert min(standard_errors(lower), standard_errors(upper)) > -5
    assert abs(standard_errors((-lower).exp() - 1)) < 5
    assert abs(standard_errors((-upper).exp() - 1)) < 5


def test_the_gap_closes_with_more_temperatures(linear_gaussian: Model) -> None:
    model = linear_gaussian(3, 6, 0.5)
    loose, tight = (
        bidirectional_bounds(model, 200, AISSettings(2, count, 2), "prior") for count in (4, 40)
    )
    difference = loose.upper - loose.lower
    assert loose.gap == pytest.approx(float(difference.mean()))
    assert loose.gap_standard_error == pytest.approx(float(difference.std() / 200**0.5))
    assert loose.gap > 5 * loose.gap_standard_error
    error = math.hypot(loose.gap_standard_error, tight.gap_standard_error)
    assert loose.gap - tight.gap > 5 * error


@pytest.mark.slow
@pytest.mark.parametrize("num_leapfrogs", [3, 5, 6])
def test_no_number_of_leapfrogs_resonates(
    num_leapfrogs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known(*arguments: Any) -> Tuned:  # as exact as from a pilot of very many chains
        tuned = tune_step_sizes(*arguments)
        mean = tuned.step_sizes.log().mean(dim=1, keepdim=True).exp()
        return tuned._replace(step_sizes=mean.expand_as(tuned.step_sizes))

    monkeypatch.setattr("dglm.ais.tune_step_sizes", known)
    # Widths of 1 : 1.5. Where the narrow coordinate is accepted at 0.65, five leapfrogs are a
    # period of the wide ones: undisturbed, the gap is 0.4, and 0.03 with three or six.
    decoder = nn.Linear(3, 3)
    with torch.no_grad():
        decoder.weight.copy_(torch.diag(torch.tensor([6.0, 4.0, 4.0])))
    model = GenerativeModel(decoder, 3, Gaussian(1.0))
    bounds = bidirectional_bounds(model, 200, AISSettings(16, 300, num_leapfrogs), "prior")
    assert bounds.gap < 0.02 + 5 * bounds.gap_standard_error
    assert bounds.gap_standard_error < 0.03


# Shares of several processes


def part_of(result: AISResult, images: slice) -> AISResult:
    fields = (field[images] for field in result[:5])
    return AISResult(*fields, gradient_evaluations=len(range(7)[images]))


@pytest.mark.parametrize("world_size", [None, 1, 2, 3, 9])
def test_shares_of_processes_are_put_in_the_order_of_the_images(
    model: GenerativeModel, images: Tensor, world_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = estimate_log_likelihood(model, images, FEW)
    shares = [[part_of(whole, slice(0, 3)), part_of(whole, slice(3, 7))]]  # of one process alone
    if world_size is not None:
        shares = in_processes(whole, world_size, monkeypatch)
    gathered = gather(shares[-1])
    assert all(map(torch.equal, gathered[:1] + gathered[2:5], whole[:1] + whole[2:5]))
    assert gathered.gradient_evaluations == 7


def in_processes(
    whole: AISResult, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> list[list[AISResult]]:
    """Return what each process has, and let the last of them gather it."""
    shares = [
        [part_of(whole, slice(rank, None, world_size))] if rank < 7 else []
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
    return shares


@pytest.mark.parametrize(
    ("begin", "backend"),
    [("prior", "eager"), ("fitted", "eager"), pytest.param("fitted", None, marks=SLOW)],
)
def test_a_compiled_transition_gives_the_same_weights(
    begin: Any, backend: str | None, compiler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend is not None:
        monkeypatch.setattr(HMC, "compile", partialmethod(HMC.compile, backend=compiler))
    model = GenerativeModel(Decoder(2, 8, [5]), 2)
    images, _ = model.sample(3, seeded_generator("cpu", 0))
    eager = estimate_log_likelihood(model, images, FEW, begin)
    compiled = estimate_log_likelihood(model, images, replace(FEW, compile=True), begin)
    assert bool(compiler.graphs) == (backend is not None)
    torch.testing.assert_close(compiled.log_weights, eager.log_weights, rtol=1e-9, atol=1e-9)
