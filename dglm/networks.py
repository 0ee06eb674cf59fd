"""Encoders and decoders."""

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
        check_sizes(latent_dim, observation_dim, hidden)
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


class Encoder(nn.Module):
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
        super().__init__()
        check_sizes(latent_dim, observation_dim, hidden)
        self.observation_dim = observation_dim
        self.latent_dim = latent_dim
        self.hidden = tuple(hidden)
        self.trunk = softplus_layers([observation_dim, *hidden])
        self.mean = nn.Linear(hidden[-1], latent_dim)
        self.log_std = nn.Linear(hidden[-1], latent_dim)

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


def check_sizes(latent_dim: int, observation_dim: int, hidden: Sequence[int]) -> None:
    """Raise ValueError where a network would have no input, no output or no hidden units."""
    if latent_dim < 1 or observation_dim < 1:
        raise ValueError(
            "latent_dim and observation_dim must be at least 1, "
            f"got {latent_dim} and {observation_dim}"
        )
    if len(hidden) == 0 or min(hidden) < 1:
        raise ValueError(f"hidden must name the units of one layer or more, got {list(hidden)}")
