"""Where annealed importance sampling starts: the prior, an encoder, or fits to the posteriors."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dglm.annealing import AnnealedEnergy, chunks_for_memory
from dglm.energy import PosteriorEnergy
from dglm.gaussian import DenseGaussian, DiagonalGaussian, gaussian_log_prob
from dglm.model import GenerativeModel, check_evaluation_mode
from samplers import HMC, State, seeded_generator, track_acceptance

_STREAM = 5
_CHAINS, _STEPS = 32, 100
_ACCEPTANCE, _GAIN = 0.8, 0.2
_INFLATION, _FLOOR = 1.2, 1e-6


class FittedStart(NamedTuple):
    """Start at a Gaussian fitted to the posterior of each image.

    It is fitted to draws of 32 chains of HMC, 100 steps each, from the encoder, one step size for
    all images that are moved at once; the first half of the steps tunes it.

    What HMC from q does not reach, another mode of the posterior, is missing from estimates, and
    their errors do not tell. "prior" starts everywhere, and bidirectional bounds tell.
    """

    encoder: nn.Module
    """q(z|x): from x to mean and log standard deviation."""


Start = nn.Module | Literal["prior"] | FittedStart
"""Where chains start: at the prior, at the q(z|x) of an encoder, or at fitted Gaussians."""


Gaussians = DiagonalGaussian | DenseGaussian
"""q₀ of each image."""


def of_images(gaussians: Gaussians, images: slice | Tensor) -> Gaussians:
    """Return the Gaussians of some of the images."""
    return type(gaussians)(*(part[images] for part in gaussians))


class WhitenedLikelihood:
    r"""What is left of the posterior's energy in the coordinates of a fitted Gaussian.

    .. math:: -\log \frac{p(x, μ + L w)\, |L|}{\mathcal N(w; 0, I)}

    With N(0, I) as the prior of w, the posterior of w is that of z = μ + L w.
    """

    def __init__(self, energy: PosteriorEnergy, fitted: DenseGaussian, chains: int) -> None:
        self.energy = energy
        self.fitted = fitted
        self.log_determinant = fitted.log_determinant().repeat_interleave(chains)

    def value_and_gradient(self, position: Tensor) -> State:
        """Return the value and the gradient at w (B, D)."""
        state = self.energy.value_and_gradient(self.fitted.colour(position))
        value = state.energy - self.log_determinant + gaussian_log_prob(position)
        return State(position, value, self.fitted.pull(state.gradient) - position)


def starting_gaussians(
    model: GenerativeModel,
    images: Tensor,
    start: Start,
    num_leapfrogs: int,
    seed: int,
    progress: Callable[[int], None] = lambda gradients: None,
) -> Gaussians:
    """Return q₀ of each image (N, D).

    Arguments:
        model: p(x, z).
        images: Observations, (N, D).
        start: Which kind.
        num_leapfrogs: Of each step of the chains that Gaussians are fitted to.
        seed: Of the noise of those chains.
        progress: Called with the number of gradients taken since the last call.

    Raises:
        ValueError: ``start`` is none of the three, or its encoder returns what is not finite or
            depends on the batch.
    """
    if isinstance(start, FittedStart):
        return _fit(model, images, start.encoder, num_leapfrogs, seed, progress)
    if isinstance(start, nn.Module):
        return encoded(start, images)
    if start != "prior":
        raise ValueError(f"start must be 'prior', an encoder module or FittedStart, got {start!r}")
    zeros = images.new_zeros(len(images), model.latent_dim)
    return DiagonalGaussian(zeros, zeros)


def annealed_path(model: GenerativeModel, rows: Tensor, start: Gaussians) -> AnnealedEnergy:
    """Return the path from q₀ to p(z|x).

    Arguments:
        model: p(x, z).
        rows: Observations, (n · C, N), the chains of an image one after another.
        start: q₀ of each of the n images. From fitted Gaussians the path is in their coordinates.
    """
    chains = len(rows) // len(start.mean)
    if isinstance(start, DenseGaussian):
        zeros = start.mean.new_zeros(len(rows), start.mean.shape[1])
        misfit = WhitenedLikelihood(model.energy(rows), start, chains)
        return AnnealedEnergy(misfit, DiagonalGaussian(zeros, zeros))
    repeated = (part.repeat_interleave(chains, dim=0) for part in start)
    return AnnealedEnergy(model.negative_log_likelihood(rows), DiagonalGaussian(*repeated))


def fit_gradients(start: Start | str, num_leapfrogs: int) -> int:
    """Return the gradients that finding q₀ takes for each image."""
    if start == "fitted" or isinstance(start, FittedStart):
        return _CHAINS * (1 + _STEPS * num_leapfrogs)
    return 0


def encoded(encoder: nn.Module, images: Tensor) -> DiagonalGaussian:
    """Return q(z|x) of images (N, D); ValueError where it is not finite or depends on the batch."""
    check_evaluation_mode("encoder", encoder)
    q = DiagonalGaussian(*encoder(images))
    if not all(bool(part.isfinite().all()) for part in q):
        raise ValueError("the encoder's q(z|x) is not finite: start at the prior, or train it anew")
    return q


def _fit(
    model: GenerativeModel,
    images: Tensor,
    encoder: nn.Module,
    num_leapfrogs: int,
    seed: int,
    progress: Callable[[int], None],
) -> DenseGaussian:
    """Fit a Gaussian to the draws of HMC on each image's posterior.

    Eagerly: compiling these shapes would take longer than most fits.
    """
    kernel, fits = HMC(num_leapfrogs).to(images), []
    for first, rows in chunks_for_memory(model, images, _CHAINS):
        generator = seeded_generator(images.device, seed, _STREAM, first)
        own = encoded(encoder, rows[::_CHAINS])
        q = DiagonalGaussian(*(part.repeat_interleave(_CHAINS, dim=0) for part in own))
        energy, moments = model.energy(rows), []
        state = kernel.init(q.sample(generator), energy)
        progress(len(rows))
        for step in range(_STEPS):
            state, info = kernel.step(state, energy, kernel.noise(state, generator))
            progress(len(rows) * num_leapfrogs)
            if step < _STEPS // 2:
                track_acceptance(kernel, info.acceptance, _ACCEPTANCE, _GAIN)
            else:
                draws = (state.position - q.mean).double().view(-1, _CHAINS, model.latent_dim)
                moments.append((draws.mean(dim=1), draws.mT @ draws / _CHAINS))
        shift, square = (torch.stack(parts).mean(dim=0) for parts in zip(*moments, strict=True))
        mean = own.mean + shift.to(rows)
        fits.append(DenseGaussian(mean, _factor(shift, square).to(rows)))
    return DenseGaussian(*(torch.cat(parts) for parts in zip(*fits, strict=True)))


def _factor(mean: Tensor, square: Tensor) -> Tensor:
    """Return L of the draws' covariance, wider: too narrow a start loses the posterior's tails."""
    covariance = square - mean[:, :, None] * mean[:, None, :]
    floor = _FLOOR * torch.eye(mean.shape[1]).to(covariance)
    return torch.linalg.cholesky(_INFLATION * covariance + floor)
