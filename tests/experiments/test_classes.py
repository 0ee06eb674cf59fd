"""Classes of filled-in images, on a model of which they are known by quadrature."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dglm import DGLM, GenerativeModel, KernelSteps
from dglm.model import NegativeLogLikelihood
from experiments.classes import (
    InpaintingTask,
    class_distances,
    class_frequencies,
    fill_in,
    means_and_errors,
    movement,
    posterior_classes,
    reference_gradients,
    total_variation,
)
from samplers import HMC, State

GIVEN = torch.tensor([True, False, True, True, False, False])
IMAGES = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
CHAINS, SWEEPS = 400, 60


class Still(nn.Module):
    """An encoder that has learned nothing: q(z|x) = p(z)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_zeros(len(x), 1), x.new_zeros(len(x), 1)


class BySecondPixel:
    """Class 1 where the second pixel is more than half white, else class 0."""

    def classify(self, images: Tensor) -> Tensor:
        return (images[..., 1] > 0.5).long()


@pytest.fixture
def hidden() -> InpaintingTask:
    decoder = nn.Linear(1, 6)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[1.5], [2.5], [-1.0], [2.0], [-3.0], [1.0]]))
        decoder.bias.copy_(torch.tensor([0.5, -0.5, 0.0, 1.0, 0.5, -1.0]))
    dglm = DGLM(GenerativeModel(decoder, 1), Still())
    classifier: Any = BySecondPixel()
    return InpaintingTask(dglm, IMAGES, GIVEN, classifier, CHAINS, SWEEPS, seed=0)


@torch.no_grad()
def probability(hidden: InpaintingTask) -> Tensor:
    """Return the posterior probability of class 1 given the given pixels, (image,)."""
    z = torch.linspace(-10, 10, 4001)[:, None]
    model = hidden.dglm.model.marginal(GIVEN)
    weights = [
        model.log_joint(x.expand(len(z), -1), z).double().softmax(dim=0)
        for x in hidden.images[:, GIVEN]
    ]
    return torch.stack(weights) @ (hidden.dglm.model.decoder(z)[:, 1] > 0).double()


def deviation(classes: Tensor, expected: Tensor) -> Tensor:
    """Return how many standard errors the frequency of class 1 is off, (image,)."""
    frequency = classes.double().mean(dim=0).view(2, CHAINS)
    return (frequency.mean(dim=1) - expected).abs() / (frequency.std(dim=1) / CHAINS**0.5)


def test_the_reference_has_the_posterior_s_frequencies(hidden: InpaintingTask) -> None:
    expected, counts = probability(hidden), []
    assert ((expected > 0.1) & (expected < 0.9)).all()
    classes = posterior_classes(hidden, counts.append)
    assert classes.shape == (SWEEPS, 2 * CHAINS)
    assert (deviation(classes, expected) < 5).all()
    assert sum(counts) == SWEEPS


def test_the_gradients_of_the_reference_are_counted(
    hidden: InpaintingTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, value_and_gradient = [], NegativeLogLikelihood.value_and_gradient

    def counting(self: NegativeLogLikelihood, position: Tensor) -> State:
        rows.append(len(position))
        return value_and_gradient(self, position)

    monkeypatch.setattr(NegativeLogLikelihood, "value_and_gradient", counting)
    short = hidden._replace(num_chains=2, sweeps=3)
    posterior_classes(short, lambda count: None)
    assert sum(rows) == reference_gradients(short)


def test_a_kernel_has_the_posterior_s_frequencies_and_a_wrong_encoder_not(
    hidden: InpaintingTask,
) -> None:
    counts: list[int] = []
    kernel, frames = fill_in(hidden, KernelSteps(HMC(3, 0.7), 2), counts.append)
    assert frames.shape == (SWEEPS, 2 * CHAINS, 6)
    assert sum(counts) == SWEEPS
    encoder, _ = fill_in(hidden, hidden.dglm.encoder, counts.append)
    expected = probability(hidden)
    # Not the first sweeps: the chains begin at draws of q.
    assert (deviation(kernel[20:], expected) < 5).all()
    assert (deviation(encoder[20:], expected) > 20).all()


def test_frequencies_and_their_distance_by_hand() -> None:
    classes = torch.tensor([[0, 0, 2, 2], [0, 1, 2, 0]])
    found = class_frequencies(classes, num_images=2, num_classes=3)
    expected = torch.tensor([[0.75, 0.25, 0.0], [0.25, 0.0, 0.75]], dtype=torch.float64)
    assert torch.equal(found, expected)
    assert total_variation(found, found).tolist() == [0, 0]
    assert total_variation(found[0], found[1]).item() == 0.75


def test_visits_and_switches_by_hand() -> None:
    classes = torch.tensor([[0, 2], [0, 2], [1, 2], [1, 2], [0, 2]])
    found = movement(classes)
    assert found["classes"].tolist() == [2, 1]
    assert found["switches"].tolist() == [50, 0]  # two of the four steps
    # The entropy of (3/5, 2/5).
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    assert found["effective_classes"].tolist() == pytest.approx([math.exp(entropy), 1])


def test_frequencies_leave_the_first_fifth_of_the_sweeps_out(hidden: InpaintingTask) -> None:
    short = hidden._replace(num_chains=2, sweeps=5)
    reference = torch.zeros(5, 4, dtype=torch.long)
    found, late = reference.clone(), reference.clone()
    found[0], late[1] = 1, 1
    distances = class_distances(short, {"first": found, "second": late}, reference)
    assert distances["first"].tolist() == [0, 0]
    assert distances["second"].tolist() == [0.25, 0.25]
    assert distances["reference"].tolist() == [0, 0]


def test_errors_of_figures_are_over_images_and_over_their_chains() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [0.0, 2.0, 4.0]])
    found = means_and_errors({"kernel": {"switches": values}})
    assert found["kernel_switches"] == 2.5
    assert found["kernel_switches_standard_error"] == pytest.approx(0.5)  # of the means 3 and 2
    # Variances 7 and 4 of three chains each, of the mean of two images.
    assert found["kernel_switches_standard_error_chains"] == pytest.approx((11 / 3) ** 0.5 / 2)
