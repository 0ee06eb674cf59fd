"""Where annealed importance sampling starts: the prior, an encoder, or fits to the posteriors."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dglm.annealing import (
    AnnealedEnergy,
    StepSizes,
    chunks_for_memory,
    pilot_gradients,
    scaled,
    temperatures,
    tune_step_sizes,
)
from dglm.checks import check_function, check_posterior
from dglm.gaussian import DenseGaussian, DiagonalGaussian, UnitMixture, gaussian_log_prob
from dglm.model import GenerativeModel, PosteriorEnergy
from samplers import State, seeded_generator, value_and_gradient

_CHAINS, _FROM_Q, _TEMPERATURES, _STEPS = 32, 8, 50, 32
_ACCEPTANCE = 0.8
_INFLATION, _FLOOR = 1.2, 1e-6
_NEGLIGIBLE = 10.0
"""A chain that is caught so many nats above the lowest is at no mode that counts."""
_APART = 4.0
"""Squared distance a dimension beyond which the means of two chains are in different modes."""
_LOOKED_AT = 5
"""Images, evenly over a set, on which an encoder is looked at for modes that it misses."""


class FittedStart(NamedTuple):
    """Start at a mixture of Gaussians fitted to the posterior of each image.

    It is fitted to draws of 32 chains of HMC. Eight of them come from the encoder, the others (all,
    without one) from a short annealing from the prior, which finds modes that the encoder misses.
    """

    encoder: nn.Module | None = None
    """q(z|x): from x to mean and log standard deviation."""


Start = nn.Module | Literal["prior", "fitted"] | FittedStart
"""Where chains start: at the prior, at the q(z|x) of an encoder, or at fits to the posteriors.

Fits find modes that the encoder misses, on each image, and "fitted" needs no encoder. An encoder
alone is looked at for them on five images of a set, by fits.
"""

StartName = Literal["prior", "encoder", "fitted"]
"""A start in the words of the commands; the encoder is the model's own."""


class Starts(NamedTuple):
    """q₀ of each of n images."""

    gaussians: DiagonalGaussian | DenseGaussian
    """Of a dense one the coordinates are those of the path."""
    centres: Tensor
    """In those coordinates q₀ is the mean of Gaussians N(a, I) at these a, (n, K, D)."""
    missed_modes: Tensor
    """Whether chains from the prior found a mode that those of the encoder had missed, (n,)."""

    def of_images(self, images: slice) -> "Starts":
        """Return those of some of the images."""
        gaussians = type(self.gaussians)(*(part[images] for part in self.gaussians))
        return Starts(gaussians, self.centres[images], self.missed_modes[images])

    def path(self, model: GenerativeModel, rows: Tensor) -> AnnealedEnergy:
        """Return the path from q₀ to p(z|x) for observations (n · C, N), C chains an image."""
        chains = len(rows) // len(self.centres)
        if isinstance(self.gaussians, DenseGaussian):
            one = bool((self.centres == self.centres[:, :1]).all())
            centres = self.centres[:, :1] if one else self.centres
            whitened = WhitenedLikelihood(model.energy(rows), self.gaussians, chains)
            return AnnealedEnergy(whitened, UnitMixture(centres, chains))
        repeated = (part.repeat_interleave(chains, dim=0) for part in self.gaussians)
        return AnnealedEnergy(model.negative_log_likelihood(rows), DiagonalGaussian(*repeated))

    def whiten(self, z: Tensor) -> Tensor:
        """Return latent variables (n · C, D) in the path's coordinates."""
        return self.gaussians.whiten(z) if isinstance(self.gaussians, DenseGaussian) else z


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


def named_start(name: StartName, encoder: nn.Module) -> Start:
    """Return where annealed importance sampling starts, in the words of the commands."""
    starts: dict[StartName, Start] = {
        "prior": "prior",
        "encoder": encoder,
        "fitted": FittedStart(encoder),
    }
    return starts[name]


def starting_points(
    model: GenerativeModel,
    images: Tensor,
    start: Start,
    num_leapfrogs: int,
    seed: int,
    progress: Callable[[int], None] = lambda gradients: None,
) -> Starts:
    """Return q₀ of each image (N, D).

    Arguments:
        model: p(x, z).
        images: Observations, (N, D).
        start: Which kind.
        num_leapfrogs: Of each step of the chains that mixtures are fitted to.
        seed: Of the noise of those chains.
        progress: Called with the number of gradients taken since the last call.

    Raises:
        ValueError: ``start`` is none of the four, or its encoder returns what is not finite or
            depends on the batch.
    """
    if start == "fitted":
        start = FittedStart()
    missed = torch.zeros(len(images), dtype=torch.bool)
    if isinstance(start, FittedStart):
        return _fitted(model, images, start.encoder, num_leapfrogs, seed, progress)
    if isinstance(start, nn.Module):
        gaussians = encoded(start, images, model.latent_dim)
        some = torch.linspace(0, len(images) - 1, _looked_at(len(images))).round().long()
        found = _fitted(model, images[some], start, num_leapfrogs, seed, progress)
        missed[some] = found.missed_modes
    elif start == "prior":
        gaussians = _standard_normals(images, model.latent_dim)
    else:
        raise ValueError(
            f"start must be 'prior', 'fitted', FittedStart or an encoder module, got {start!r}"
        )
    return Starts(gaussians, torch.zeros_like(gaussians.mean)[:, None], missed)


def encoded(encoder: nn.Module, images: Tensor, latent_dim: int) -> DiagonalGaussian:
    """Return q(z|x) of images (N, D).

    Raises:
        ValueError: It is not finite, depends on the batch, or is not of ``latent_dim`` variables.
    """
    some = torch.cat([images[:2], torch.zeros_like(images[:1])])
    check_posterior(check_function("encoder", encoder, some), len(some), latent_dim)
    q = DiagonalGaussian(*encoder(images))
    if not all(bool(part.isfinite().all()) for part in q):
        raise ValueError("the encoder's q(z|x) is not finite: start at the prior, or train it anew")
    return q


def fit_gradients(num_images: int, start: Start | StartName, num_leapfrogs: int) -> int:
    """Return the gradients that finding q₀ of so many images takes, and looking at an encoder."""
    if start == "prior":
        return 0
    encoder = start.encoder if isinstance(start, FittedStart) else start
    with_encoder = encoder not in (None, "fitted")
    if not (start == "fitted" or isinstance(start, FittedStart)):
        num_images = _looked_at(num_images)
    annealed = _CHAINS - _FROM_Q if with_encoder else _CHAINS
    annealing = annealed * pilot_gradients(_TEMPERATURES, num_leapfrogs)
    return num_images * (annealing + _CHAINS * (1 + 2 * _STEPS * num_leapfrogs))


def _looked_at(num_images: int) -> int:
    return min(num_images, _LOOKED_AT)


def _standard_normals(rows: Tensor, dim: int) -> DiagonalGaussian:
    zeros = rows.new_zeros(len(rows), dim)
    return DiagonalGaussian(zeros, zeros)


def _fitted(
    model: GenerativeModel,
    images: Tensor,
    encoder: nn.Module | None,
    num_leapfrogs: int,
    seed: int,
    progress: Callable[[int], None],
) -> Starts:
    """Fit to the draws of HMC on each image's posterior.

    Eagerly: compiling these shapes would take longer than most fits.
    """
    pieces = []
    for first, rows in chunks_for_memory(model, images, _CHAINS):
        generator = seeded_generator(images.device, seed, "ais.fit", first)
        chains = _FittingChains(model, rows, encoder, num_leapfrogs, generator, progress)
        chains.settle()
        pieces.append(chains.fit())
    gaussians, centres, missed = zip(*pieces, strict=True)
    dense = DenseGaussian(*(torch.cat(parts) for parts in zip(*gaussians, strict=True)))
    return Starts(dense, torch.cat(centres), torch.cat(missed))


class _FittingChains:
    """32 chains for each of n images, eight of them from q if there is one, others annealed."""

    def __init__(
        self,
        model: GenerativeModel,
        rows: Tensor,
        encoder: nn.Module | None,
        num_leapfrogs: int,
        generator: torch.Generator,
        progress: Callable[[int], None],
    ) -> None:
        self.energy, self.generator = model.energy(rows), generator
        self.progress, self.num_leapfrogs = progress, num_leapfrogs
        self.shape = len(rows) // _CHAINS, _CHAINS, model.latent_dim
        self.from_q = 0 if encoder is None else _FROM_Q
        images, count = rows[::_CHAINS], _CHAINS - self.from_q
        annealed = images.repeat_interleave(count, dim=0)
        prior = _standard_normals(annealed, model.latent_dim)
        tuned = tune_step_sizes(
            AnnealedEnergy(model.negative_log_likelihood(annealed), prior),
            temperatures(_TEMPERATURES),
            num_leapfrogs,
            count,
            generator,
            scaled(progress, len(annealed)),
        )
        position = tuned.position.view(len(images), count, -1)
        if encoder is not None:
            q = encoded(encoder, images, model.latent_dim)
            repeated = (part.repeat_interleave(self.from_q, dim=0) for part in q)
            draws = DiagonalGaussian(*repeated).sample(generator)
            position = torch.cat([draws.view(len(images), self.from_q, -1), position], dim=1)
        self.state = value_and_gradient(self.energy, position.flatten(0, 1))
        progress(len(rows))
        self.tuning = StepSizes(num_leapfrogs, tuned.step_sizes[-1].log(), _CHAINS, _ACCEPTANCE)
        self.ancestors = torch.arange(_CHAINS, device=rows.device).expand(len(images), -1)

    def settle(self) -> None:
        """Tune the step sizes; then put copies of the others in the place of chains far too high.

        Where those are caught, the posterior has next to no mass.
        """
        mean = torch.zeros_like(self.state.energy)
        for step in range(_STEPS):
            self._step(tune=True)
            if step >= _STEPS // 2:
                mean += self.state.energy / (_STEPS - _STEPS // 2)
        height = mean.view(self.shape[:2]).nan_to_num(torch.inf)
        kept = height <= height.amin(dim=1, keepdim=True) + _NEGLIGIBLE
        others = torch.multinomial(kept.to(height), _CHAINS, True, generator=self.generator)
        self.ancestors = torch.where(kept, self.ancestors, others)
        first = torch.arange(0, len(mean), _CHAINS, device=mean.device)
        rows = (self.ancestors + first[:, None]).flatten()
        position, energy, gradient = (part[rows] for part in self.state[:3])
        self.state = State(position, energy, gradient)

    def fit(self) -> tuple[DenseGaussian, Tensor, Tensor]:
        """Return the Gaussian, the centres and the missed modes of :class:`Starts`.

        Chains whose means are near to each other, in units of what each of them covers, are in one
        mode, and have one centre.
        """
        steps = []
        for _ in range(_STEPS):
            self._step(tune=False)
            steps.append(self.state.position.view(self.shape))
        draws = torch.stack(steps, dim=2)
        means = draws.mean(dim=2)
        each = _whitened(_factor(draws, means), means)
        distances = (each[:, :, None] - each[:, None]).square().sum(dim=3)
        near = distances < _APART * self.shape[2]
        modes = (near / near.sum(dim=2, keepdim=True)).to(means) @ means
        centre = modes.mean(dim=1)
        factor = _INFLATION**0.5 * _factor(draws, modes)
        from_q = self.ancestors < self.from_q
        apart = ~from_q & ~(near & from_q[:, None]).any(dim=2)
        missed = apart.any(dim=1) if self.from_q else torch.zeros_like(apart[:, 0])
        # In order, so that chains that take their centres in turn are shared out among the modes.
        order = modes[:, :, :1].argsort(dim=1).expand_as(modes)
        centres = _whitened(factor, modes.gather(1, order) - centre[:, None])
        return DenseGaussian(centre, factor.to(centre)), centres, missed.cpu()

    def _step(self, tune: bool) -> None:
        self.state = self.tuning.step(self.state, self.energy, self.generator, tune)
        self.progress(len(self.state.energy) * self.num_leapfrogs)


def _factor(draws: Tensor, centres: Tensor) -> Tensor:
    """Return L of the covariance of draws (n, C, S, D) around their chain's centre, (n, C, D).

    In float64.
    """
    away = (draws - centres[:, :, None]).flatten(1, 2).double()
    covariance = away.mT @ away / away.shape[1]
    return torch.linalg.cholesky(covariance + _FLOOR * torch.eye(away.shape[2]).to(covariance))


def _whitened(factor: Tensor, points: Tensor) -> Tensor:
    """Return L⁻¹ a for points a (n, C, D)."""
    return torch.linalg.solve_triangular(factor, points.mT.double(), upper=False).mT.to(points)
