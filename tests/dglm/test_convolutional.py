import pytest
import torch
from torch import Tensor, nn

from dglm import (
    AISSettings,
    Bernoulli,
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    DiagonalGaussian,
    Gaussian,
    GenerativeModel,
    estimate_log_likelihood,
)
from dglm.chain import run_chain
from dglm.likelihoods import Likelihood
from samplers import HMC, L2HMC, Kernel, seeded_generator, value_and_gradient
from samplers.io import build, describe

SHAPE, PIXELS, LATENT = (2, 8, 4), 64, 3


class Curved(nn.Module):
    """A decoder of no familiar kind: no layers, a shape inside, and a mean in its output."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Parameter(torch.randn(LATENT, *SHAPE))

    def forward(self, z: Tensor) -> Tensor:
        image = torch.einsum("bd,dchw->bchw", torch.sin(z), self.field)
        return (image + image.mean(dim=(2, 3), keepdim=True) ** 2).flatten(1)


def decoder() -> ConvolutionalDecoder:
    return ConvolutionalDecoder(LATENT, SHAPE, (5, 4), output_scale=1.0)


def test_the_decoder_doubles_sides_and_the_encoder_halves_them() -> None:
    made = decoder()
    z, x = torch.randn(7, LATENT), torch.rand(7, PIXELS)
    assert made.input(z).shape == (7, 5 * 2 * 1)
    assert made.trunk(made.input(z)).shape == (7, 4, 4, 2)
    assert made(z).shape == (7, PIXELS)
    encoder = ConvolutionalEncoder(SHAPE, LATENT, (4, 5))
    assert [part.shape for part in encoder(x)] == [(7, LATENT)] * 2
    assert encoder.trunk(x).shape == (7, 5 * 2 * 1)


def test_flat_images_are_rows_of_channels() -> None:
    made = decoder()
    z = torch.randn(1, LATENT)
    with torch.no_grad():
        made.output.bias.copy_(torch.tensor([0.0, 100.0]))
    assert (made(z)[0].view(SHAPE).flatten(1).mean(dim=1) > 50).tolist() == [False, True]


def test_output_scale_multiplies_the_initial_weights_of_the_last_layer() -> None:
    torch.manual_seed(3)
    plain = decoder()
    torch.manual_seed(3)
    scaled = ConvolutionalDecoder(LATENT, SHAPE, (5, 4), output_scale=0.25)
    for (name, found), wanted in zip(scaled.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, (0.25 if name == "output.weight" else 1.0) * wanted)


@pytest.mark.parametrize("network", [decoder(), ConvolutionalEncoder(SHAPE, LATENT, (4, 5))])
def test_networks_are_rebuilt_from_their_description(network: nn.Module) -> None:
    again = build(describe(network)).to(torch.get_default_dtype())
    again.load_state_dict(network.state_dict())
    x = torch.rand(3, LATENT if isinstance(network, ConvolutionalDecoder) else PIXELS)
    torch.testing.assert_close(again(x), network.to(torch.get_default_dtype())(x))


@pytest.mark.parametrize(
    ("shape", "channels", "message"),
    [
        ((1, 28, 28), (8, 8, 8), "multiples of 8, got images of 28 x 28"),
        ((1, 8, 6), (8, 8), "multiples of 4, got images of 8 x 6"),
        ((8, 8), (8,), "channels, height and width"),
        ((0, 8, 8), (8,), "must be at least 1"),
        ((1, 8, 8), (), "channels must name"),
        ((1, 8, 8), (8, 0), "channels must name"),
    ],
)
def test_sizes_that_cannot_be(
    shape: tuple[int, ...], channels: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ConvolutionalDecoder(2, shape, channels)
    with pytest.raises(ValueError, match=message):
        ConvolutionalEncoder(shape, 2, channels)


@pytest.mark.parametrize("make", [decoder, Curved])
@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(0.5)])
def test_the_energy_is_minus_the_log_joint_through_any_decoder(
    make: type[nn.Module], likelihood: Likelihood
) -> None:
    model = GenerativeModel(make(), LATENT, likelihood)
    x, z = torch.rand(5, PIXELS), torch.randn(5, LATENT)
    state = value_and_gradient(model.energy(x), z)
    torch.testing.assert_close(state.energy, -model.log_joint(x, z).detach())
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-model.log_joint(x, leaf).sum(), leaf)
    torch.testing.assert_close(state.gradient, gradient)


@pytest.mark.parametrize("make", [decoder, Curved])
def test_training_reaches_each_part_through_any_decoder(make: type[nn.Module]) -> None:
    model = GenerativeModel(make(), LATENT)
    encoder = ConvolutionalEncoder(SHAPE, LATENT, (4,))
    kernel = L2HMC(LATENT, 2, 0.2, 8, observation_dim=PIXELS, embedding_hidden=(6,))
    x, generator = torch.rand(5, PIXELS).round(), seeded_generator("cpu", 0)
    q = DiagonalGaussian(*encoder(x))
    z = q.sample(generator)
    chain = run_chain(model, kernel, x, q, z, 2, generator)
    log_joint = model.log_joint(x, chain.state.position.detach())
    (chain.loss - log_joint + model.energy(x)(z) - q.entropy()).mean().backward()
    for part in (model.decoder, encoder, kernel):
        gradients = [parameter.grad for parameter in part.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert all(gradient.abs().max() > 0 for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("kernel", [HMC(4, 0.1), L2HMC(LATENT, 4, 0.1, 8)])
def test_kernels_are_exact_on_a_convolutional_posterior(kernel: Kernel) -> None:
    energy = GenerativeModel(decoder(), LATENT).energy(torch.rand(5, PIXELS).round())
    kernel, z = kernel.to(torch.get_default_dtype()), torch.randn(5, LATENT)
    errors = kernel.round_trip(z, energy, kernel.noise(kernel.init(z, energy)))
    assert max(error.abs().max() for error in errors) < 1e-9


def test_annealed_importance_sampling_through_a_convolutional_decoder() -> None:
    torch.manual_seed(2)
    model = GenerativeModel(ConvolutionalDecoder(1, (1, 4, 4), (3,), output_scale=5.0), 1)
    x, _ = model.sample(3, seeded_generator("cpu", 1))
    result = estimate_log_likelihood(model, x, AISSettings(64, 60, 3), "prior")
    grid = torch.linspace(-8, 8, 4001)[:, None]
    with torch.no_grad():
        exact = torch.stack([model.log_joint(row.expand(4001, -1), grid).logsumexp(0) for row in x])
    exact += torch.tensor(16 / 4000).log()
    assert (result.effective_sample_size > 10).all()
    assert ((result.log_likelihood - exact).abs() < 5 * result.standard_error).all()
