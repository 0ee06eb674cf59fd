"""The models that the commands build."""

import math
from typing import Literal

from torch import nn

from data import MNIST_SHAPE
from dglm import (
    DGLM,
    AmortizedPreconditioned,
    Bernoulli,
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    Decoder,
    Encoder,
    Gaussian,
    GaussianNetwork,
    GenerativeModel,
)
from samplers import HMC, L2HMC, Kernel

KernelName = Literal["none", "hmc", "l2hmc"]
LikelihoodName = Literal["bernoulli", "gaussian"]

_NOISE_SCALE = 0.1


def build_dglm(
    kernel: KernelName = "l2hmc",
    latent_dim: int = 20,
    hidden: list[int] = [200, 200],  # noqa: B006  (jsonargparse shows it in --help)
    channels: list[int] | None = None,
    likelihood: LikelihoodName = "bernoulli",
    noise_scale: float = _NOISE_SCALE,
    num_mh_steps: int = 2,
    num_leapfrogs: int = 4,
    step_size: float = 0.4,
    coordinates: bool = True,
    sampler_hidden: int = 100,
    embedding_hidden: list[int] = [200],  # noqa: B006
    learning_rate: float = 4e-3,
    jump_scale: float = 1.0,
    decay_share: float = 0.3,
    seed: int = 0,
    image_shape: tuple[int, int, int] = MNIST_SHAPE,
) -> DGLM:
    """Build a model of images.

    Args:
        kernel: What refines the posterior draws: none (VAE), hmc (HMC-DGLM) or l2hmc (L2HMC-DGLM).
        latent_dim: Length of the latent vector z.
        hidden: Units in each hidden layer of the decoder; the encoder mirrors them.
        channels: Channels in each hidden layer of a convolutional decoder, which doubles the sides
            of the image in each; the encoder mirrors them. If null, networks are dense.
        likelihood: What pixels are: bernoulli (drawn with the grey level as probability) or
            gaussian (grey levels themselves, with --data.binarize false).
        noise_scale: Standard deviation of gaussian pixels around their mean.
        num_mh_steps: Metropolis-Hastings steps from the encoder's draw to the decoder's.
        num_leapfrogs: Leapfrogs in each of those steps.
        step_size: Step size of the leapfrogs at the start; HMC adapts it, L2HMC learns it.
        coordinates: Let the kernel move in coordinates of each image's own, which a network learns
            from the chain's draws; false is the paper's way, for which steps of 0.1 suit.
        sampler_hidden: Units in each hidden layer of the sampler's networks.
        embedding_hidden: Units in the hidden layers of the image embedding that the sampler sees.
        learning_rate: Learning rate of Adam; the paper's is 0.001.
        jump_scale: The jump that the sampler's loss counts as good, in standard deviations of q;
            without coordinates, in which L2HMC has another loss.
        decay_share: Share of the training, its last part, in which the learning rate falls
            geometrically to 3 %.
        seed: Seed of the training noise.
        image_shape: Channels, height and width of an image.
    """
    if likelihood == "bernoulli" and noise_scale != _NOISE_SCALE:
        raise ValueError("noise_scale is of gaussian pixels: leave it out, or choose them")
    pixels = math.prod(image_shape)
    decoder: nn.Module
    encoder: nn.Module
    if channels is None:
        decoder = Decoder(latent_dim, pixels, hidden)
        encoder = Encoder(pixels, latent_dim, hidden[::-1])
    else:
        decoder = ConvolutionalDecoder(latent_dim, image_shape, channels)
        encoder = ConvolutionalEncoder(image_shape, latent_dim, channels[::-1])
    sampler: Kernel | None = None
    if kernel == "hmc":
        sampler = HMC(num_leapfrogs, step_size)
    elif kernel == "l2hmc":
        sampler = L2HMC(
            latent_dim,
            num_leapfrogs,
            step_size,
            hidden=sampler_hidden,
            head_scale=0.01,
            observation_dim=pixels,
            embedding_hidden=embedding_hidden,
        )
    if sampler is not None and coordinates:
        network = GaussianNetwork(pixels, latent_dim)
        sampler = AmortizedPreconditioned(sampler, network, encoder)
    observed = Bernoulli() if likelihood == "bernoulli" else Gaussian(noise_scale)
    model = GenerativeModel(decoder, latent_dim, observed)
    return DGLM(model, encoder, sampler, num_mh_steps, learning_rate, seed, jump_scale, decay_share)


def kernel_name(dglm: DGLM) -> str:
    """Return the name of a model's kernel as an option says it, with its coordinates."""
    name = "none" if dglm.sampler is None else type(dglm.sampler).__name__.lower()
    return name if dglm.coordinate_network is None else f"{name} in coordinates"


def model_name(dglm: DGLM) -> str:
    """Return what the paper calls such a model."""
    names = {HMC: "HMC-DGLM", L2HMC: "L2HMC-DGLM", type(None): "VAE"}
    name = names.get(type(dglm.sampler), "DGLM")
    return name if dglm.coordinate_network is None else f"{name} in coordinates"
