import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dglm import GenerativeModel
from dglm.ais import BidirectionalBounds, bidirectional_bounds

Model = Callable[..., GenerativeModel]
ExactLogLikelihood = Callable[[GenerativeModel, Tensor], Tensor]


pytestmark = pytest.mark.usefixtures("quick_pilot")


class Simulation:
    """Keeps the images that a model simulates."""

    def __init__(self, model: GenerativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
        sample = model.sample

        def recording(*arguments: object) -> tuple[Tensor, Tensor]:
            self.x, z = sample(*arguments)  # type: ignore[arg-type]
            return self.x, z

        monkeypatch.setattr(model, "sample", recording)


def standard_errors(difference: Tensor) -> float:
    return float(difference.mean() / (difference.std() / len(difference) ** 0.5))


def test_bounds_enclose_the_exact_log_likelihood(
    linear_gaussian: Model,
    exact_log_likelihood: ExactLogLikelihood,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = linear_gaussian(3, 6, 0.5)
    simulation = Simulation(model, monkeypatch)
    bounds = bidirectional_bounds(model, 200, 2, 6, 2)
    exact = exact_log_likelihood(model, simulation.x)
    # So few temperatures leave both bounds visibly loose.
    assert standard_errors(exact - bounds.lower) > 5
    assert standard_errors(bounds.upper - exact) > 5
    assert bounds.gap > 5 * bounds.gap_standard_error


def test_bounds_are_unbiased_on_the_scale_of_the_likelihood(
    linear_gaussian: Model,
    exact_log_likelihood: ExactLogLikelihood,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = linear_gaussian(2, 4, 1.0)
    simulation = Simulation(model, monkeypatch)
    bounds = bidirectional_bounds(model, 2000, 2, 5, 2)
    exact = exact_log_likelihood(model, simulation.x)
    assert abs(standard_errors((bounds.lower - exact).exp() - 1)) < 5
    assert abs(standard_errors((exact - bounds.upper).exp() - 1)) < 5


def test_the_gap_closes_with_more_temperatures(linear_gaussian: Model) -> None:
    model = linear_gaussian(3, 6, 0.5)
    loose, tight = (bidirectional_bounds(model, 200, 2, count, 2) for count in (4, 40))
    error = math.hypot(loose.gap_standard_error, tight.gap_standard_error)
    assert loose.gap - tight.gap > 5 * error


def test_the_result_is_a_function_of_the_seed(model: GenerativeModel) -> None:
    first, again, other = (bidirectional_bounds(model, 3, 2, 3, 1, seed=seed) for seed in (1, 1, 2))
    for found, wanted in zip(first[:2], again[:2], strict=True):
        assert torch.equal(found, wanted)
    assert not torch.equal(first.upper, other.upper)


def test_the_gap_and_its_error_are_over_images(model: GenerativeModel) -> None:
    bounds = bidirectional_bounds(model, 5, 3, 4, 1)
    assert isinstance(bounds, BidirectionalBounds)
    assert bounds.lower.shape == bounds.upper.shape == (5,)
    difference = bounds.upper - bounds.lower
    assert bounds.gap == pytest.approx(float(difference.mean()))
    assert bounds.gap_standard_error == pytest.approx(float(difference.std() / 5**0.5))


def test_gradient_evaluations_are_counted_and_reported(
    model: GenerativeModel, gradients: list[int]
) -> None:
    reported: list[int] = []
    bounds = bidirectional_bounds(model, 5, 3, 4, 2, progress=reported.append)
    assert bounds.gradient_evaluations == sum(gradients) == sum(reported)


def test_a_decoder_that_is_not_a_function_of_z_has_no_bounds() -> None:
    decoder = nn.Sequential(nn.Linear(2, 6), nn.Dropout())
    with pytest.raises(ValueError, match=r"Dropout is in training mode.*eval\(\)"):
        bidirectional_bounds(GenerativeModel(decoder, 2), 2)


class Ramp(nn.Module):
    """A decoder without parameters."""

    def forward(self, z: Tensor) -> Tensor:
        return z.sum(dim=-1, keepdim=True) * torch.linspace(-1, 1, 6)


def test_a_decoder_needs_no_parameters() -> None:
    bounds = bidirectional_bounds(GenerativeModel(Ramp(), 2), 3, 2, 5, 2)
    assert bounds.lower.isfinite().all()


@pytest.mark.parametrize("num_images", [1, 0])
def test_one_image_has_no_error_bar(model: GenerativeModel, num_images: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 for an error bar, got {num_images}"):
        bidirectional_bounds(model, num_images)
