"""Convolutional encoders and decoders; images stay flat outside of them."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


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
