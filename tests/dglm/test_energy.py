from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor

from dglm import Decoder, GenerativeModel
from dglm.model import NegativeLogLikelihood
from samplers import value_and_gradient


@pytest.fixture(params=[(1,), (5,), (7, 6, 5)], ids=str)
def deep(request: pytest.FixtureRequest) -> GenerativeModel:
    model = GenerativeModel(Decoder(3, 9, request.param), 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1.5)
    return model


def by_autograd(misfit: NegativeLogLikelihood, z: Tensor) -> tuple[Tensor, Tensor]:
    state = value_and_gradient(misfit.__call__, z)
    return state.energy, state.gradient


@pytest.mark.parametrize("distance", [1.0, 30.0, 1e4])
def test_the_gradient_by_hand_is_that_of_autograd(deep: GenerativeModel, distance: float) -> None:
    # So far out softplus and sigmoid saturate on both sides. torch's softplus is linear above 20,
    # where that by hand is exact: they differ by up to exp(-20) = 2e-9.
    z, x = distance * torch.randn(20, 3), torch.rand(20, 9)
    misfit = deep.negative_log_likelihood(x)
    with torch.no_grad():
        found = misfit.value_and_gradient(z)
    energy, gradient = by_autograd(misfit, z)
    torch.testing.assert_close(found.energy, energy, rtol=1e-8, atol=1e-7)
    scale = gradient.abs().max()
    torch.testing.assert_close(found.gradient / scale, gradient / scale, rtol=0, atol=1e-8)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_the_gradient_by_hand_is_that_of_autograd_with_products_by_onednn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("samplers.compiling.onednn_is_faster", lambda device: True)
    model = GenerativeModel(Decoder(3, 220, (200, 210)), 3).float()
    z, misfit = (
        torch.randn(128, 3).float(),
        model.negative_log_likelihood(torch.rand(128, 220).float()),
    )
    with torch.no_grad(), torch.profiler.profile(acc_events=True) as profile:
        found = misfit.value_and_gradient(z)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 4  # of layers of 200 or more, up and down
    energy, gradient = by_autograd(misfit, z)
    torch.testing.assert_close(found.energy, energy, rtol=1e-5, atol=0)
    scale = gradient.abs().max()
    torch.testing.assert_close(found.gradient / scale, gradient / scale, rtol=0, atol=1e-5)


def other_activation(decoder: Decoder) -> None:
    decoder.trunk[3] = torch.nn.ReLU()


def steeper_activation(decoder: Decoder) -> None:
    decoder.trunk[1] = torch.nn.Softplus(beta=5)


def no_bias(decoder: Decoder) -> None:
    decoder.output = torch.nn.Linear(4, 9, bias=False)


def hooked(decoder: Decoder) -> None:
    decoder.trunk[0].register_forward_hook(lambda layer, inputs, output: 2 * output)


def pruned(decoder: Decoder) -> None:
    torch.nn.utils.prune.random_unstructured(decoder.trunk[0], "weight", 0.5)


@pytest.mark.parametrize("change", [other_activation, steeper_activation, no_bias, hooked, pruned])
def test_a_decoder_whose_layers_were_replaced_is_left_to_autograd(
    change: Callable[[Decoder], None],
) -> None:
    decoder = Decoder(3, 9, (5, 4))
    change(decoder)
    misfit, z = (
        GenerativeModel(decoder, 3).negative_log_likelihood(torch.rand(2, 9)),
        torch.randn(2, 3),
    )
    with torch.no_grad():
        found = misfit.value_and_gradient(z)
    torch.testing.assert_close((found.energy, found.gradient), by_autograd(misfit, z))
    torch.testing.assert_close(found.energy, misfit(z).detach())


def test_where_it_is_differentiated_again_autograd_takes_the_gradient(
    deep: GenerativeModel,
) -> None:
    z = torch.randn(2, 3, requires_grad=True)
    misfit = deep.negative_log_likelihood(torch.rand(2, 9))
    assert torch.autograd.gradcheck(lambda z: misfit.value_and_gradient(z).gradient, z)
