import warnings
from collections.abc import Callable
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
    GenerativeModel,
    estimate_log_likelihood,
)
from dglm.ais import gather, join
from dglm.annealing import Annealed, anneal
from samplers import HMC, seeded_generator

Model = Callable[..., GenerativeModel]
ExactLogLikelihood = Callable[[GenerativeModel, Tensor], Tensor]
EncoderBeside = Callable[[GenerativeModel, float, float], nn.Module]


Start = Callable[[GenerativeModel], Any]


@pytest.fixture(params=["prior", "encoder", "fitted"])
def start(request: pytest.FixtureRequest, encoder_beside: EncoderBeside) -> Start:
    """A builder of each of the three starts."""

    def build(model: GenerativeModel) -> Any:
        encoder = encoder_beside(model, 0.5, 1.3)
        return {"prior": "prior", "encoder": encoder, "fitted": FittedStart(encoder)}[request.param]

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
    result = estimate_log_likelihood(model, x, 200, 100, 5, start=start(model))
    error = (result.log_likelihood - exact_log_likelihood(model, x)).abs()
    assert (result.effective_sample_size > 10).all()
    assert (error < 5 * result.standard_error).all()
    assert (result.standard_error < 0.3).all()


@pytest.mark.usefixtures("quick_pilot")
def test_estimates_of_the_likelihood_are_unbiased_at_few_temperatures(
    linear_gaussian: Model, exact_log_likelihood: ExactLogLikelihood, start: Start
) -> None:
    model, seeds = linear_gaussian(2, 4, 1.0), 50
    x = draw(model, 4)
    exact = exact_log_likelihood(model, x)
    ratios = torch.stack(
        [
            estimate_log_likelihood(model, x, 100, 5, 2, start(model), seed).log_likelihood - exact
            for seed in range(seeds)
        ]
    ).exp()
    mean = ratios.mean(dim=1)
    assert (mean.mean() - 1).abs() < 5 * mean.std() / seeds**0.5


def test_standard_errors_are_those_of_independent_runs(
    linear_gaussian: Model, exact_log_likelihood: ExactLogLikelihood
) -> None:
    model = linear_gaussian(2, 4, 1.0)
    x = draw(model, 1).expand(400, -1)
    result = estimate_log_likelihood(model, x, 50, 10, 2)
    spread = result.log_likelihood.std()
    promised = result.standard_error.square().mean().sqrt()
    # The relative error of a standard deviation of 400 numbers is 1/√800, tails aside.
    assert promised == pytest.approx(float(spread), rel=0.2)


def test_acceptance_is_near_its_target(linear_gaussian: Model, start: Start) -> None:
    model = linear_gaussian(3, 8, 0.3)
    result = estimate_log_likelihood(model, draw(model, 4), 100, 60, 3, start(model))
    assert result.acceptance.shape == (4,)
    assert ((result.acceptance - 0.65).abs() < 0.1).all()


# What the result rests on


@pytest.mark.usefixtures("quick_pilot")
def test_the_result_is_a_function_of_the_seed(linear_gaussian: Model) -> None:
    model = linear_gaussian()
    x = draw(model, 3)

    def estimate(seed: int) -> AISResult:
        torch.seed()
        return estimate_log_likelihood(model, x, 4, 5, 2, seed=seed)

    assert torch.equal(estimate(1).log_weights, estimate(1).log_weights)
    assert not torch.equal(estimate(1).log_weights, estimate(2).log_weights)


@pytest.mark.usefixtures("quick_pilot")
def test_step_sizes_do_not_depend_on_the_chains_that_count(
    linear_gaussian: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, step_sizes = linear_gaussian(), []
    x = draw(model, 3)

    def recording(*arguments: Any) -> Annealed:
        kernel, given = arguments[3:5]
        assert isinstance(kernel, HMC)
        step_sizes.append(given.clone())
        found = anneal(*arguments)
        assert torch.equal(given, step_sizes[-1])
        assert float(kernel.step_size) == pytest.approx(float(given[-1]))
        return found

    monkeypatch.setattr("dglm.ais.anneal", recording)
    first = estimate_log_likelihood(model, x, 4, 5, 2)
    monkeypatch.setattr("dglm.ais._CHAIN_STREAM", 7)
    second = estimate_log_likelihood(model, x, 4, 5, 2)
    assert torch.equal(step_sizes[0], step_sizes[1])
    assert not torch.equal(first.log_weights, second.log_weights)


@pytest.mark.usefixtures("quick_pilot")
@pytest.mark.parametrize("num_temperatures", [1, 2, 7])
@pytest.mark.parametrize("fitted", [False, True])
def test_gradient_evaluations_are_counted_and_reported(
    model: GenerativeModel,
    images: Tensor,
    gradients: list[int],
    num_temperatures: int,
    fitted: bool,
) -> None:
    reported: list[int] = []
    begin: Any = FittedStart(Encoder(6, 3, (4,))) if fitted else "prior"
    result = estimate_log_likelihood(
        model, images, 3, num_temperatures, 2, begin, progress=reported.append
    )
    assert result.gradient_evaluations == sum(gradients) == sum(reported)


@pytest.mark.usefixtures("quick_pilot")
def test_weights_are_float64_for_a_float32_model(model: GenerativeModel, images: Tensor) -> None:
    double = estimate_log_likelihood(model, images, 4, 5, 2)
    single = estimate_log_likelihood(model.float(), images.float(), 4, 5, 2)
    for result in (single, double):
        assert result.log_weights.dtype == torch.float64
        assert result.log_likelihood.dtype == torch.float64
        assert result.log_weights.shape == (7, 4)


def test_log_likelihood_and_its_error_follow_from_the_weights(
    model: GenerativeModel, images: Tensor
) -> None:
    result = estimate_log_likelihood(model, images, 50, 1, 2)
    weights = result.log_weights.exp()
    mean, error = weights.mean(dim=1), weights.std(dim=1) / 50**0.5
    torch.testing.assert_close(result.log_likelihood, mean.log())
    torch.testing.assert_close(result.standard_error, error / mean)
    size = weights.sum(dim=1).square() / weights.square().sum(dim=1)
    torch.testing.assert_close(result.effective_sample_size, size)


@pytest.mark.usefixtures("quick_pilot")
def test_estimates_in_pieces_cover_all_images_in_order(
    linear_gaussian: Model,
    exact_log_likelihood: ExactLogLikelihood,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, sizes = linear_gaussian(2, 4, 1.0), []
    # Farther and farther out, so that they differ by more than the error of an estimate.
    bias = model.decoder.bias.detach()
    x = bias + torch.arange(5)[:, None] * torch.tensor([1.0, -1.0, 0.5, 0.5])

    def recording(energy: Any, position: Tensor, *rest: Any) -> Annealed:
        sizes.append(len(position))
        return anneal(energy, position, *rest)

    monkeypatch.setattr("dglm.ais.anneal", recording)
    whole = estimate_log_likelihood(model, x, 200, 60, 3, start(model))
    monkeypatch.setattr("dglm.annealing._MEMORY_BUDGET", 1)
    pieces = estimate_log_likelihood(model, x, 200, 60, 3, start(model))
    assert sizes == [1000] + [200] * 5
    exact = exact_log_likelihood(model, x)
    for result in (whole, pieces):
        assert ((result.log_likelihood - exact).abs() < 5 * result.standard_error).all()
        assert (exact.diff().abs() > 5 * result.standard_error[1:]).all()
    assert not torch.equal(pieces.log_weights[1], whole.log_weights[1])
    assert pieces.gradient_evaluations == whole.gradient_evaluations


@pytest.mark.usefixtures("quick_pilot")
def test_chains_of_different_pieces_have_different_noise(
    linear_gaussian: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dglm.annealing._MEMORY_BUDGET", 1)
    model = linear_gaussian()
    same = draw(model, 1).expand(3, -1)
    result = estimate_log_likelihood(model, same, 4, 5, 2)
    assert len(set(result.log_weights.flatten().tolist())) == 12


@pytest.mark.usefixtures("quick_pilot")
def test_estimates_work_in_inference_mode(model: GenerativeModel, images: Tensor) -> None:
    expected = estimate_log_likelihood(model, images, 3, 5, 2)
    with torch.inference_mode():
        found = estimate_log_likelihood(model, images, 3, 5, 2)
    torch.testing.assert_close(found.log_weights, expected.log_weights)
    assert found.gradient_evaluations == expected.gradient_evaluations


@pytest.mark.usefixtures("quick_pilot")
def test_nothing_is_left_on_the_model(model: GenerativeModel, images: Tensor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = estimate_log_likelihood(model, images, 3, 5, 2)
    assert not result.log_weights.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Shares of several processes


def part_of(result: AISResult, images: slice) -> AISResult:
    return AISResult(*(field[images] for field in result[:4]), len(range(7)[images]))


@pytest.mark.usefixtures("quick_pilot")
def test_consecutive_results_are_joined(model: GenerativeModel, images: Tensor) -> None:
    whole = estimate_log_likelihood(model, images, 3, 3, 1)
    joined = join([part_of(whole, slice(0, 3)), part_of(whole, slice(3, 7))])
    assert all(map(torch.equal, joined[:4], whole[:4]))
    assert joined.gradient_evaluations == 7


@pytest.mark.usefixtures("quick_pilot")
@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_shares_of_processes_are_put_in_the_order_of_the_images(
    model: GenerativeModel, images: Tensor, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = estimate_log_likelihood(model, images, 3, 3, 1)
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
    assert all(map(torch.equal, gathered[:4], whole[:4]))
    assert gathered.gradient_evaluations == 7


def test_one_process_has_all_there_is(model: GenerativeModel, images: Tensor) -> None:
    parts = [estimate_log_likelihood(model, images, 2, 1, 1, seed=seed) for seed in (0, 1)]
    assert all(map(torch.equal, gather(parts)[:4], join(parts)[:4]))


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_chains": 0}, "num_chains must be at least 1, got 0"),
        ({"num_temperatures": 0}, "num_temperatures must be at least 1, got 0"),
        ({"num_leapfrogs": 0}, "num_leapfrogs must be at least 1, got 0"),
        ({"start": "posterior"}, "start must be 'prior', an encoder module or FittedStart"),
        ({"schedule": "cosine"}, "must be 'sigmoid' or 'linear', got 'cosine'"),
        ({"images": torch.full((2, 6), torch.nan)}, "2 of 2 observations hold NaN"),
        ({"images": torch.full((2, 6), 255.0)}, r"in \[0, 1\]"),
        ({"images": torch.zeros(2, 5)}, r"flat, \(B, 6\), got \(2, 5\)"),
        ({"images": torch.zeros(0, 6)}, "the batch is empty"),
    ],
)
def test_impossible_settings_are_refused(
    model: GenerativeModel, images: Tensor, changes: dict[str, Any], message: str
) -> None:
    settings = {"images": images, "num_chains": 2, "num_temperatures": 2, "num_leapfrogs": 1}
    with pytest.raises(ValueError, match=message):
        estimate_log_likelihood(model, **{**settings, **changes})


@pytest.mark.parametrize("name", ["num_chains", "num_temperatures", "num_leapfrogs"])
def test_impossible_counts_are_refused_before_anything_runs(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        AISSettings(**{name: 0})


@pytest.mark.parametrize("name", ["start", "schedule"])
def test_unknown_names_are_refused_before_anything_runs(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'nowhere'"):
        AISSettings(**{name: "nowhere"})  # type: ignore[arg-type]


def test_one_chain_has_no_standard_error(model: GenerativeModel, images: Tensor) -> None:
    result = estimate_log_likelihood(model, images, 1, 1, 1)
    assert result.log_likelihood.isfinite().all()
    assert result.standard_error.isnan().all()


@pytest.mark.parametrize("fitted", [False, True])
def test_a_compiled_transition_gives_the_same_weights(fitted: bool) -> None:
    model = GenerativeModel(Decoder(2, 8, [5]), 2)
    images, _ = model.sample(3, seeded_generator("cpu", 0))
    begin: Any = FittedStart(Encoder(8, 2, [4])) if fitted else "prior"
    options: dict[str, Any] = {"num_chains": 4, "num_temperatures": 6, "num_leapfrogs": 2}
    options["start"] = begin
    eager = estimate_log_likelihood(model, images, **options)
    with warnings.catch_warnings():  # where there is no compiler, the estimate is the eager one
        warnings.filterwarnings("ignore", "torch.compile does not work here")
        compiled = estimate_log_likelihood(model, images, **options, compile=True)
    torch.testing.assert_close(compiled.log_weights, eager.log_weights, rtol=1e-9, atol=1e-9)
