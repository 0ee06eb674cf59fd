"""Dense and convolutional encoders and decoders."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from dglm import ConvolutionalDecoder, ConvolutionalEncoder, Decoder, Encoder
from dglm.networks import softplus_layers

SHAPE, PIXELS = (2, 8, 4), 64


def test_a_dense_decoder_is_a_softplus_network_with_a_linear_end() -> None:
    decoder, z = Decoder(3, 6, (4, 5)), torch.randn(7, 3)
    hidden = softplus(decoder.trunk[2](softplus(decoder.trunk[0](z))))
    torch.testing.assert_close(decoder(z), decoder.output(hidden))
    layers = softplus_layers([2, 3, 4])
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Softplus] * 2
    assert [layer.out_features for layer in layers[::2]] == [3, 4]


@pytest.mark.parametrize(
    "encoder", [Encoder(PIXELS, 3, (4, 5)), ConvolutionalEncoder(SHAPE, 3, (4, 5))]
)
def test_encoders_give_mean_and_log_standard_deviation(encoder: nn.Module) -> None:
    x = torch.rand(7, PIXELS)
    mean, log_std = encoder.double()(x)
    assert mean.shape == log_std.shape == (7, 3)
    torch.testing.assert_close(mean, encoder.mean(encoder.trunk(x)))
    torch.testing.assert_close(log_std, encoder.log_std(encoder.trunk(x)))


@pytest.mark.parametrize(
    "build",
    [
        lambda scale: Decoder(3, 6, (4,), output_scale=scale),
        lambda scale: ConvolutionalDecoder(3, SHAPE, (5, 4), output_scale=scale),
    ],
)
def test_output_scale_multiplies_the_initial_weights_of_the_last_layer(
    build: Callable[[float], nn.Module],
) -> None:
    torch.manual_seed(3)
    plain = build(1.0)
    torch.manual_seed(3)
    for (name, found), wanted in zip(
        build(0.25).named_parameters(), plain.parameters(), strict=True
    ):
        assert torch.equal(found, (0.25 if name == "output.weight" else 1.0) * wanted)


def test_a_convolutional_decoder_doubles_sides_and_the_encoder_halves_them() -> None:
    made = ConvolutionalDecoder(3, SHAPE, (5, 4), output_scale=1.0)
    z = torch.randn(7, 3)
    assert made.input(z).shape == (7, 5 * 2 * 1)
    assert made.trunk(made.input(z)).shape == (7, 4, 4, 2)
    assert made(z).shape == (7, PIXELS)
    encoder = ConvolutionalEncoder(SHAPE, 3, (4, 5))
    assert encoder.trunk(torch.rand(7, PIXELS)).shape == (7, 5 * 2 * 1)
    # Flat images are rows of channels.
    with torch.no_grad():
        made.output.bias.copy_(torch.tensor([0.0, 100.0]))
    assert (made(z)[0].view(SHAPE).flatten(1).mean(dim=1) > 50).tolist() == [False, True]


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
