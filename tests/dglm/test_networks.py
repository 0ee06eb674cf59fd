import torch
from torch import nn
from torch.nn.functional import softplus

from dglm import Decoder, Encoder
from dglm.networks import softplus_layers


def test_decoder_is_a_softplus_network_with_a_linear_end() -> None:
    decoder, z = Decoder(3, 6, (4, 5)), torch.randn(7, 3)
    hidden = softplus(decoder.trunk[2](softplus(decoder.trunk[0](z))))
    torch.testing.assert_close(decoder(z), decoder.output(hidden))
    assert decoder(z).shape == (7, 6)


def test_output_scale_multiplies_the_initial_weights_of_the_last_layer() -> None:
    torch.manual_seed(3)
    plain = Decoder(3, 6, (4,), output_scale=1.0)
    torch.manual_seed(3)
    scaled = Decoder(3, 6, (4,), output_scale=0.25)
    for (name, found), wanted in zip(scaled.named_parameters(), plain.parameters(), strict=True):
        factor = 0.25 if name == "output.weight" else 1.0
        assert torch.equal(found, factor * wanted)


def test_encoder_gives_mean_and_log_standard_deviation() -> None:
    encoder, x = Encoder(6, 3, (4, 5)), torch.rand(7, 6)
    mean, log_std = encoder(x)
    features = encoder.trunk(x)
    assert mean.shape == log_std.shape == (7, 3)
    torch.testing.assert_close(mean, encoder.mean(features))
    torch.testing.assert_close(log_std, encoder.log_std(features))


def test_softplus_follows_every_layer() -> None:
    layers = softplus_layers([2, 3, 4])
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Softplus] * 2
    assert [layer.out_features for layer in layers[::2]] == [3, 4]
