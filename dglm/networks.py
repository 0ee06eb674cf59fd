"""Encoders and decoders, dense and convolutional; images stay flat outside of them."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Decoder(nn.Module):
    r"""A softplus network from latent variables to the parameters of the likelihood.

    .. math:: h_0 = z, \quad h_l = \mathrm{softplus}(W_l h_{l - 1} + b_l), \quad W h_L + b

    Arguments:
        latent_dim: Length of z.
        observation_dim: Length of x.
        hidden: Units in each hidden layer.
        output_scale: Factor on the initial weights of the last layer.

    Raises:
        ValueError: A size is below 1, or there is no hidden layer.

    Shapes: z (B, latent_dim) to logits or means (B, observation_dim).
    """

    def __init__(
        self,
        latent_dim: int,
        observation_dim: int,
        hidden: Sequence[int] = (1024, 1024),
        output_scale: float = 0.01,
    ) -> None:
        super().__init__()
        check_layers(latent_dim, observation_dim, hidden)
        self.latent_dim = latent_dim
        self.observation_dim = observation_dim
        self.hidden = tuple(hidden)
        self.output_scale = output_scale
        self.trunk = softplus_layers([latent_dim, *hidden])
        self.output = nn.Linear(hidden[-1], observation_dim)
        with torch.no_grad():
            self.output.weight.mul_(output_scale)

    @property
    def is_plain(self) -> bool:
        """Whether the layers are still those that the constructor made, with their own weights."""
        layers = [*self.trunk, self.output]
        kinds = [nn.Linear, nn.Softplus] * len(self.hidden) + [nn.Linear]
        return [type(layer) for layer in layers] == kinds and all(map(_is_plain, layers))

    def forward(self, z: Tensor) -> Tensor:
        """Return the logits or means, (B, observation_dim)."""
        return self.output(self.trunk(z))


def _is_plain(layer: nn.Module) -> bool:
    hooks = layer._forward_hooks or layer._forward_pre_hooks  # weight_norm's and prune's are such
    if isinstance(layer, nn.Softplus):
        return layer.beta == 1 and not hooks
    return {name for name, _ in layer.named_parameters()} == {"weight", "bias"} and not hooks


class InferenceNetwork(nn.Module):
    """What networks from observations to Gaussians of z have in common: softplus layers."""

    def __init__(self, observation_dim: int, latent_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        check_layers(latent_dim, observation_dim, hidden)
        self.observation_dim = observation_dim
        self.latent_dim = latent_dim
        self.hidden = tuple(hidden)
        self.trunk = softplus_layers([observation_dim, *hidden])


class Encoder(InferenceNetwork):
    r"""A softplus network from observations to a Gaussian q(z|x) with diagonal covariance.

    .. math:: q(z|x) = N(z; μ(x), \operatorname{diag}(σ(x)^2))

    Arguments:
        observation_dim: Length of x.
        latent_dim: Length of z.
        hidden: Units in each hidden layer.

    Raises:
        ValueError: A size is below 1, or there is no hidden layer.

    Shapes: x (B, observation_dim) to (mean, log standard deviation), each (B, latent_dim).
    """

    def __init__(
        self, observation_dim: int, latent_dim: int, hidden: Sequence[int] = (1024, 1024)
    ) -> None:
        super().__init__(observation_dim, latent_dim, hidden)
        self.mean = nn.Linear(hidden[-1], latent_dim)
        self.log_std = nn.Linear(hidden[-1], latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the log standard deviation, each (B, latent_dim)."""
        features = self.trunk(x)
        return self.mean(features), self.log_std(features)


class ConvolutionalDecoder(nn.Module):
    """A softplus network that doubles the sides of an image in each transposed convolution.

    Arguments:
        latent_dim: Length of z.
        image_shape: Channels, height and width of an image, (C, H, W).
        channels: Channels of the hidden images, the smallest image first; each is half as high
            and wide as the next, the last half as high and wide as the observation.
        output_scale: Factor on the initial weights of the last layer.

    Raises:
        ValueError: A size is below 1, there are no channels, or a side cannot be halved so often.

    Shapes: z (B, latent_dim) to logits or means (B, C · H · W).
    """

    def __init__(
        self,
        latent_dim: int,
        image_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        output_scale: float = 0.01,
    ) -> None:
        super().__init__()
        smallest = smallest_image(latent_dim, image_shape, channels)
        self.latent_dim = latent_dim
        self.image_shape = tuple(image_shape)
        self.channels = tuple(channels)
        self.output_scale = output_scale
        self.input = nn.Linear(latent_dim, math.prod(smallest))
        layers: list[nn.Module] = [nn.Unflatten(1, smallest), nn.Softplus()]
        for inputs, outputs in pairwise(channels):
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.Softplus()]
        self.trunk = nn.Sequential(*layers)
        self.output = nn.ConvTranspose2d(channels[-1], image_shape[0], 4, 2, 1)
        with torch.no_grad():
            self.output.weight.mul_(output_scale)

    def forward(self, z: Tensor) -> Tensor:
        """Return the logits or means, (B, C · H · W)."""
        return self.output(self.trunk(self.input(z))).flatten(1)


class ConvolutionalEncoder(nn.Module):
    """A softplus network that halves the sides of an image in each convolution.

    Arguments:
        image_shape: Channels, height and width of an image, (C, H, W).
        latent_dim: Length of z.
        channels: Channels of the hidden images, the largest image first.

    Raises:
        ValueError: A size is below 1, there are no channels, or a side cannot be halved so often.

    Shapes: x (B, C · H · W) to (mean, log standard deviation), each (B, latent_dim).
    """

    def __init__(
        self, image_shape: Sequence[int], latent_dim: int, channels: Sequence[int] = (32, 64)
    ) -> None:
        super().__init__()
        smallest = smallest_image(latent_dim, image_shape, channels[::-1])
        self.image_shape = tuple(image_shape)
        self.latent_dim = latent_dim
        self.channels = tuple(channels)
        layers: list[nn.Module] = [nn.Unflatten(1, self.image_shape)]
        for inputs, outputs in pairwise([image_shape[0], *channels]):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.Softplus()]
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.mean = nn.Linear(math.prod(smallest), latent_dim)
        self.log_std = nn.Linear(math.prod(smallest), latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the log standard deviation, each (B, latent_dim)."""
        features = self.trunk(x)
        return self.mean(features), self.log_std(features)


class Selected(nn.Module):
    """Some of the outputs of a decoder.

    Arguments:
        decoder: From z (B, latent_dim) to (B, N).
        kept: Which outputs, boolean, (N,).
    """

    def __init__(self, decoder: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("places", kept.nonzero()[:, 0], persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Return them, (B, number kept)."""
        return self.decoder(z).index_select(1, self.get_buffer("places"))


def softplus_layers(sizes: Sequence[int]) -> nn.Sequential:
    """Return linear layers of the given sizes, each followed by softplus."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Softplus()]
    return nn.Sequential(*layers)


def check_layers(latent_dim: int, observation_dim: int, hidden: Sequence[int]) -> None:
    """Raise ValueError where a network would have no input, no output or no hidden units."""
    if latent_dim < 1 or observation_dim < 1:
        raise ValueError(
            "latent_dim and observation_dim must be at least 1, "
            f"got {latent_dim} and {observation_dim}"
        )
    if len(hidden) == 0 or min(hidden) < 1:
        raise ValueError(f"hidden must name the units of one layer or more, got {list(hidden)}")


def smallest_image(
    latent_dim: int, image_shape: Sequence[int], channels: Sequence[int]
) -> tuple[int, int, int]:
    """Return the shape of the smallest hidden image, that of ``channels[0]`` channels.

    Raises:
        ValueError: A size is below 1, there are no channels, or a side cannot be halved so often.
    """
    if len(image_shape) != 3 or min(*image_shape, latent_dim) < 1:
        raise ValueError(
            "latent_dim and the channels, height and width of image_shape must be at least 1, "
            f"got {latent_dim} and {list(image_shape)}"
        )
    if len(channels) == 0 or min(channels) < 1:
        raise ValueError(f"channels must name those of one layer or more, got {list(channels)}")
    _, height, width = image_shape
    factor = 2 ** len(channels)
    if height % factor or width % factor:
        raise ValueError(
            f"{len(channels)} convolutions halve the sides as often, so they must be multiples of "
            f"{factor}, got images of {height} x {width}: choose fewer channels"
        )
    return channels[0], height // factor, width // factor
