"""The models that the commands build."""

from typing import Literal

from dglm import DGLM, Decoder, Encoder, GenerativeModel
from samplers import HMC, L2HMC, Kernel

KernelName = Literal["none", "hmc", "l2hmc"]
IMAGE_SIZE = 28 * 28


def build_dglm(
    kernel: KernelName = "l2hmc",
    latent_dim: int = 20,
    hidden: list[int] = [200, 200],  # noqa: B006  (jsonargparse shows it in --help)
    num_mh_steps: int = 3,
    num_leapfrogs: int = 5,
    step_size: float = 0.1,
    sampler_hidden: int = 100,
    embedding_hidden: list[int] = [200],  # noqa: B006
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> DGLM:
    """Build a model of binary images.

    Args:
        kernel: What refines the posterior draws: none (VAE), hmc (HMC-DGLM) or l2hmc (L2HMC-DGLM).
        latent_dim: Length of the latent vector z.
        hidden: Units in each hidden layer of the decoder; the encoder mirrors them.
        num_mh_steps: Metropolis-Hastings steps from the encoder's draw to the decoder's.
        num_leapfrogs: Leapfrogs in each of those steps.
        step_size: Step size of the leapfrogs at the start; HMC adapts it, L2HMC learns it.
        sampler_hidden: Units in each hidden layer of the sampler's networks.
        embedding_hidden: Units in the hidden layers of the image embedding that the sampler sees.
        learning_rate: Learning rate of Adam.
        seed: Seed of the training noise.
    """
    decoder = Decoder(latent_dim, IMAGE_SIZE, hidden)
    encoder = Encoder(IMAGE_SIZE, latent_dim, hidden[::-1])
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
            observation_dim=IMAGE_SIZE,
            embedding_hidden=embedding_hidden,
        )
    model = GenerativeModel(decoder, latent_dim)
    return DGLM(model, encoder, sampler, num_mh_steps, learning_rate, seed)
