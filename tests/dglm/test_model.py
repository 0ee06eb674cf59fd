"""The model's densities and energies for decoders of every kind, its draws and its observations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Normal

from dglm import ConvolutionalDecoder, Decoder, Encoder, Gaussian, GenerativeModel
from samplers import State, seeded_generator
from samplers.energy import value_and_gradient


@pytest.fixture
def z() -> Tensor:
    return torch.randn(7, 3)


class Curved(nn.Module):
    """A decoder of no familiar kind: no layers, a shape inside, and a mean in its output."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Parameter(torch.randn(3, 2, 4, 4))

    def forward(self, z: Tensor) -> Tensor:
        image = torch.einsum("bd,dchw->bchw", torch.sin(z), self.field)
        return (image + image.mean(dim=(2, 3), keepdim=True) ** 2).flatten(1)


def changed(change: Callable[[Decoder], object]) -> Callable[[], Decoder]:
    """Return a builder of decoders whose layers are no longer those that the constructor made."""

    def build() -> Decoder:
        decoder = Decoder(3, 9, (5, 4), output_scale=1.0)
        change(decoder)
        return decoder

    return build


def other_activation(decoder: Decoder) -> None:
    decoder.trunk[3] = nn.ReLU()


def steeper_activation(decoder: Decoder) -> None:
    decoder.trunk[1] = nn.Softplus(beta=5)


def no_bias(decoder: Decoder) -> None:
    decoder.output = nn.Linear(4, 9, bias=False)


def hooked(decoder: Decoder) -> None:
    decoder.trunk[0].register_forward_hook(lambda layer, inputs, output: 2 * output)


def pruned(decoder: Decoder) -> None:
    nn.utils.prune.random_unstructured(decoder.trunk[0], "weight", 0.5)


def with_buffers() -> nn.Module:
    decoder = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)).eval()
    decoder[1].running_mean.normal_()
    return decoder


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 6),
    "one unit": lambda: Decoder(3, 9, (1,), output_scale=1.0),
    "deep": lambda: Decoder(3, 9, (7, 6, 5), output_scale=1.0),
    "other activation": changed(other_activation),
    "steeper activation": changed(steeper_activation),
    "no bias": changed(no_bias),
    "hooked": changed(hooked),
    "pruned": changed(pruned),
    "convolutional": lambda: ConvolutionalDecoder(3, (2, 8, 4), (5, 4), output_scale=1.0),
    "curved": Curved,
    "with buffers": with_buffers,
    "without parameters": nn.Softplus,
}
LIKELIHOODS: dict[str, tuple[Any, Callable[[Tensor], Distribution]]] = {
    "Bernoulli": (None, lambda logits: Bernoulli(logits=logits, validate_args=False)),
    "Gaussian": (Gaussian(0.3), lambda mean: Normal(mean, 0.3)),
}


@pytest.mark.parametrize("distance", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_energies_and_their_gradients_are_those_of_torch_distributions(
    decoder: str, likelihood: str, distance: float
) -> None:
    own, distribution = LIKELIHOODS[likelihood]
    model = GenerativeModel(DECODERS[decoder](), 3, own)
    z = (distance * torch.randn(20, 3)).requires_grad_()
    parameters = model.decoder(z)
    x = torch.rand_like(parameters)
    misfit = -distribution(parameters).log_prob(x).sum(dim=-1)
    energy = misfit - Normal(torch.zeros(()), 1.0).log_prob(z).sum(dim=-1)
    (gradient,) = torch.autograd.grad(energy.sum(), z)
    scale = gradient.abs().max()

    def check(found: State) -> None:
        # So far out softplus and sigmoid saturate on both sides. torch's softplus is linear above
        # 20, where that by hand is exact: they differ by up to exp(-20) = 2e-9.
        torch.testing.assert_close(found.energy, energy.detach(), rtol=1e-8, atol=1e-7)
        torch.testing.assert_close(found.gradient / scale, gradient / scale, rtol=0, atol=1e-8)

    start = z.detach()
    check(value_and_gradient(model.energy(x), start))
    with torch.no_grad():
        check(model.energy(x).value_and_gradient(start))
    with torch.inference_mode():
        check(value_and_gradient(model.energy(x), start))
    for found, wanted in (
        (model.log_joint(x, z), -energy),
        (model.log_likelihood(x, z), -misfit),
        (model.negative_log_likelihood(x)(z), misfit),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("decoder", ["linear", "deep", "convolutional"])
def test_energies_are_differentiated_again_but_not_in_the_decoder(decoder: str) -> None:
    model, z = GenerativeModel(DECODERS[decoder](), 3), torch.randn(2, 3, requires_grad=True)
    energy = model.energy(torch.rand(2, model.check_decoder()))
    assert torch.autograd.gradcheck(lambda z: energy.value_and_gradient(z).gradient, z)
    state = value_and_gradient(energy, z)
    loss = state.energy.sum() + state.gradient.square().sum()
    found = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    assert found == (None,) * len(found)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_energies_and_marginals_see_weights_that_were_updated_in_place(
    model: GenerativeModel, images: Tensor, z: Tensor
) -> None:
    energy, marginal = model.energy(images), model.marginal(GIVEN)
    before = [energy(z), -marginal.log_joint(images[:, GIVEN], z)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    after = [model.energy(images)(z), -marginal.log_joint(images[:, GIVEN], z)]
    for found in (after[0], energy(z), energy.value_and_gradient(z).energy):
        torch.testing.assert_close(found, -model.log_joint(images, z).detach())
        assert not found.requires_grad
    for first, second in zip(before, after, strict=True):
        assert ((second - first).abs() > 1e-3).all()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_the_gradient_by_hand_is_that_of_autograd_with_products_by_onednn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("samplers.compiling.onednn_is_faster", lambda device: True)
    model = GenerativeModel(Decoder(3, 220, (200, 210)), 3).float()
    z, x = torch.randn(128, 3).float(), torch.rand(128, 220).float()
    misfit = model.negative_log_likelihood(x)
    with torch.no_grad(), torch.profiler.profile(acc_events=True) as profile:
        found = misfit.value_and_gradient(z)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 4  # of layers of 200 or more, up and down
    expected = value_and_gradient(misfit.__call__, z)
    torch.testing.assert_close(found.energy, expected.energy, rtol=1e-5, atol=0)
    scale = expected.gradient.abs().max()
    wanted = expected.gradient / scale
    torch.testing.assert_close(found.gradient / scale, wanted, rtol=0, atol=1e-5)


# Draws


def test_samples_have_the_moments_of_the_model(
    linear_gaussian: Callable[..., GenerativeModel],
) -> None:
    count, model = 50_000, linear_gaussian(2, 4, 0.5)
    x, z = model.sample(count, seeded_generator("cpu", 0))
    weight = model.decoder.weight.detach()
    joint = torch.cat([torch.eye(2), weight])
    covariance = joint @ joint.mT
    covariance[2:, 2:] += 0.25 * torch.eye(4)
    centred = torch.cat([z, x - model.decoder.bias.detach()], dim=-1)
    variance = covariance.diagonal()
    assert (centred.mean(dim=0).abs() < 5 * (variance / count).sqrt()).all()
    # var(x y) = var(x) var(y) + cov(x, y)² for centred Gaussians.
    error = ((variance[:, None] * variance + covariance.square()) / count).sqrt()
    assert ((centred.mT @ centred / count - covariance).abs() < 5 * error).all()


def test_samples_take_the_type_of_a_decoder_if_it_has_parameters(model: GenerativeModel) -> None:
    assert {part.dtype for part in model.float().sample(2)} == {torch.float32}
    assert GenerativeModel(nn.Softplus(), 6).sample(5)[0].shape == (5, 6)


# Observations


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5), r"flat, \(B, 6\), or images of 6 numbers, got \(2, 5\)"),
        (torch.zeros(6), r"got \(6,\)"),
        (torch.zeros(2, 28, 28), r"got \(2, 28, 28\)"),
        (torch.full((2, 6), -0.5), r"in \[0, 1\], got \[-0.5, -0.5\].*Normalize"),
        (torch.full((2, 6), 255, dtype=torch.uint8), "divide images of 0 to 255 by 255"),
        ("images", "must be a tensor or an array, got <class 'str'>"),
    ],
)
def test_impossible_observations_are_refused(model: GenerativeModel, x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.observations(x)


@pytest.mark.parametrize(
    "given",
    [
        lambda x: x.view(7, 1, 2, 3),
        lambda x: x.numpy(),
        lambda x: x.bool(),
        lambda x: x.half(),
        lambda x: x.tolist(),
        lambda x: [x, torch.arange(7)],
        lambda x: (x.view(7, 2, 3), torch.arange(7)),
    ],
)
def test_observations_are_taken_in_any_usual_form(
    model: GenerativeModel, images: Tensor, given: Callable[[Tensor], Any]
) -> None:
    found = model.observations(given(images))
    assert torch.equal(found, images)
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("behind", "message", "cure", "likelihood"),
    [
        (nn.Unflatten(1, (1, 2, 3)), r"flat \(B, N\), but .*Flatten\(\)", nn.Flatten(), None),
        (nn.Sigmoid(), "takes logits, .* leave out the Sigmoid", nn.Identity(), Gaussian()),
    ],
)
def test_decoders_that_do_not_suit_the_likelihood_are_refused(
    behind: nn.Module, message: str, cure: nn.Module, likelihood: Any, images: Tensor
) -> None:
    decoder = nn.Sequential(nn.Linear(3, 6), behind)
    with pytest.raises(ValueError, match=message):
        GenerativeModel(decoder, 3).observations(images)
    GenerativeModel(nn.Sequential(decoder, cure), 3, likelihood).observations(images)


def test_a_decoder_of_two_outputs_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must return one tensor, flat \(B, N\), .* returns 2"):
        GenerativeModel(Encoder(3, 6, (4,)), 3).observations(images)


# The model of some of the observations


GIVEN = torch.tensor([True, False, True, True, False, True])


def test_the_marginal_model_sums_over_the_other_observations(
    model: GenerativeModel, images: Tensor, z: Tensor
) -> None:
    patterns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2)
    whole = images.repeat(4, 1, 1)
    whole[..., ~GIVEN] = patterns[:, None]
    joint = torch.stack([model.log_joint(x, z) for x in whole]).logsumexp(dim=0)
    marginal, x = model.marginal(GIVEN), images[:, GIVEN]
    torch.testing.assert_close(marginal.log_joint(x, z), joint)
    state, leaf = value_and_gradient(marginal.energy(x), z), z.clone().requires_grad_()
    torch.testing.assert_close(state.energy, -joint.detach())
    (gradient,) = torch.autograd.grad(-marginal.log_joint(x, leaf).sum(), leaf)
    torch.testing.assert_close(state.gradient, gradient)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (GIVEN.double(), r"must be boolean, \(6,\), got torch.float64, \(6,\)"),
        (GIVEN[:5], r"got torch.bool, \(5,\)"),
        (GIVEN.expand(7, 6), r"got torch.bool, \(7, 6\)"),
        (torch.zeros(6).bool(), "no observation is given"),
    ],
)
def test_impossible_masks_are_refused(model: GenerativeModel, given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.marginal(given)
