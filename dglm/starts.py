"""Where annealed importance sampling starts: the prior, a network, or fits to the posteriors."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dglm.annealing import (
    AnnealedEnergy,
    StepSizes,
    WhitenedLikelihood,
    chunks_for_memory,
    likely_step_sizes,
    pilot_gradients,
    scaled,
    temperatures,
    tune_step_sizes,
)
from dglm.checks import check_factors, check_function, check_posterior
from dglm.gaussian import DenseGaussian, DiagonalGaussian, UnitMixture, shrunk_covariance
from dglm.model import GenerativeModel
from samplers import State, seeded_generator, value_and_gradient
from samplers.random import standard_normal

if TYPE_CHECKING:
    from dglm.module import DGLM

_CHAINS, _FROM_Q, _TEMPERATURES, _STEPS = 32, 8, 50, 32
_REFINING_CHAINS, _REFINING_STEPS = 16, 8
_ACCEPTANCE = 0.8
_INFLATION, _FLOOR = 1.2, 1e-6
_NEGLIGIBLE = 10.0
"""A chain that is caught so many nats above the lowest is at no mode that counts."""
_APART = 4.0
"""Squared distance a dimension beyond which the means of two chains are in different modes."""
_NO_COORDINATES = "no coordinates to start at: choose the start fitted, or a kernel in coordinates"
_LOOKED_AT = 5  # images, evenly over a set, for modes that a network misses


class FittedStart(NamedTuple):
    """Start at a mixture of Gaussians fitted to the posterior of each image.

    It is fitted to draws of 32 chains of HMC. Eight of them come from the encoder, the others (all,
    without one) from a short annealing from the prior, which finds modes that the encoder misses.
    """

    encoder: nn.Module | None = None
    """q(z|x): from x to mean and log standard deviation."""


class RefinedStart(NamedTuple):
    """Start at the Gaussian that a network gives to each image, corrected by short chains from it.

    Sixteen of HMC in its coordinates: 1,296 gradients of five leapfrogs; a fit takes 17,256.
    """

    network: nn.Module | None
    """From x to μ and L, as a kernel in coordinates, ``dglm.kernel``."""


Start = nn.Module | Literal["prior", "fitted"] | FittedStart | RefinedStart
"""Where chains start: the prior, the q(z|x) of an encoder, coordinates, or fits to the posteriors.

Fits find modes that a network misses, on each image, and "fitted" needs none. An encoder or
coordinates alone are looked at for them on five images of a set, by fits.
"""

StartName = Literal["prior", "encoder", "coordinates", "fitted"]
"""A start in the words of the commands; encoder and coordinates are the model's own."""


class Starts(NamedTuple):
    """q₀ of each of n images."""

    gaussians: DiagonalGaussian | DenseGaussian
    """Of a dense one the coordinates are those of the path."""
    centres: Tensor
    """In those coordinates q₀ is the mean of Gaussians N(a, I) at these a, (n, K, D)."""
    missed_modes: Tensor
    """Whether chains from the prior found a mode that those of the network had missed, (n,)."""

    @classmethod
    def around(cls, gaussians: DiagonalGaussian | DenseGaussian) -> "Starts":
        """Return one Gaussian for each image, around its mean."""
        missed = torch.zeros(len(gaussians.mean), dtype=torch.bool)
        return cls(gaussians, torch.zeros_like(gaussians.mean)[:, None], missed)

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


def named_start(name: StartName, dglm: "DGLM") -> Start:
    """Return where annealed importance sampling of a model starts, in the words of the commands.

    Raises:
        ValueError: At coordinates, of which the model has none.
    """
    starts: dict[StartName, Start] = {
        "prior": "prior",
        "encoder": dglm.encoder,
        "coordinates": RefinedStart(dglm.kernel),
        "fitted": FittedStart(dglm.encoder),
    }
    if name == "coordinates" and dglm.coordinate_network is None:
        raise ValueError(_NO_COORDINATES)
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
        num_leapfrogs: At least as many in each step of the chains that Gaussians are fitted to.
        seed: Of the noise of those chains.
        progress: Called with the number of gradients taken since the last call.

    Raises:
        ValueError: ``start`` is none of the five, or its network returns what is not finite, is of
            another kind or depends on the batch.
    """
    if start == "fitted":
        start = FittedStart()
    if isinstance(start, FittedStart):
        return _fitted(model, images, start.encoder, num_leapfrogs, seed, progress)
    if start == "prior":
        return Starts.around(_standard_normals(images, model.latent_dim))
    if isinstance(start, RefinedStart):
        given = given_gaussians(start.network, images, model.latent_dim)
        starts = Starts.around(_refined(model, images, given, num_leapfrogs, seed, progress))
    elif isinstance(start, nn.Module):
        starts = Starts.around(encoded(start, images, model.latent_dim))
    else:
        raise ValueError(
            "start must be 'prior', 'fitted', FittedStart, RefinedStart or an encoder module, got "
            f"{start!r}"
        )
    some = torch.linspace(0, len(images) - 1, min(len(images), _LOOKED_AT)).round().long()
    found = _fitted(model, images[some], start, num_leapfrogs, seed, progress)
    starts.missed_modes[some] = found.missed_modes
    return starts


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


def given_gaussians(network: nn.Module | None, images: Tensor, latent_dim: int) -> DenseGaussian:
    """Return the Gaussians of images (N, D) that the network of a kernel's coordinates gives.

    Raises:
        ValueError: There is no network, or what it returns depends on the batch, or is no mean and
            lower triangular factor with a positive diagonal of ``latent_dim`` variables.
    """
    if network is None:
        raise ValueError(_NO_COORDINATES)
    some = torch.cat([images[:2], torch.zeros_like(images[:1])])
    check_function("network of RefinedStart", network, some)
    given = DenseGaussian(*network(images))
    check_factors(given, latent_dim)
    return given


def fit_gradients(num_images: int, latent_dim: int, start: Start, num_leapfrogs: int) -> int:
    """Return the gradients that finding q₀ of so many images takes, and looking for modes."""
    if start == "prior":
        return 0
    refining = 0
    if isinstance(start, RefinedStart):
        refining = num_images * _REFINING_CHAINS * (1 + 2 * _REFINING_STEPS * num_leapfrogs)
    fitted = start == "fitted" or isinstance(start, FittedStart)
    alone = start == "fitted" or (isinstance(start, FittedStart) and start.encoder is None)
    annealing = _CHAINS if alone else _CHAINS - _FROM_Q
    annealing *= pilot_gradients(_TEMPERATURES, num_leapfrogs)
    leapfrogs = _crossing_leapfrogs(latent_dim, num_leapfrogs)
    each = annealing + _CHAINS * (1 + 2 * _STEPS * leapfrogs)
    return refining + each * (num_images if fitted else min(num_images, _LOOKED_AT))


def _crossing_leapfrogs(latent_dim: int, num_leapfrogs: int) -> int:
    """Return how many carry a chain across a posterior; chains that stay would pass for modes."""
    return max(num_leapfrogs, latent_dim // 5)


def _standard_normals(rows: Tensor, dim: int) -> DiagonalGaussian:
    zeros = rows.new_zeros(len(rows), dim)
    return DiagonalGaussian(zeros, zeros)


def _refined(
    model: GenerativeModel,
    images: Tensor,
    given: DenseGaussian,
    num_leapfrogs: int,
    seed: int,
    progress: Callable[[int], None],
) -> DenseGaussian:
    """Correct Gaussians by draws of short chains of HMC in their own coordinates."""
    pieces = []
    for first, rows in chunks_for_memory(model, images, _REFINING_CHAINS):
        generator = seeded_generator(images.device, seed, "ais.refinement", first)
        own = slice(first, first + len(rows) // _REFINING_CHAINS)
        gaussian = DenseGaussian(*(part[own] for part in given))
        path = Starts.around(gaussian).path(model, rows)
        path.beta = 1.0
        state = path.value_and_gradient(path.start.sample(generator))
        progress(len(rows))
        each = len(gaussian.mean), _REFINING_CHAINS, model.latent_dim
        tuning = StepSizes(num_leapfrogs, likely_step_sizes(state, each), each[1], _ACCEPTANCE)
        draws = []
        for step in range(2 * _REFINING_STEPS):
            state = tuning.step(state, path, generator, tune=step < _REFINING_STEPS)
            progress(len(rows) * num_leapfrogs)
            if step >= _REFINING_STEPS:
                draws.append(state.position.view(each))
        pieces.append(_corrected(gaussian, torch.cat(draws, dim=1)))
    return DenseGaussian(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _corrected(given: DenseGaussian, draws: Tensor) -> DenseGaussian:
    """Return Gaussians a fifth wider than draws w (n, S, D) of coordinates."""
    floor = _FLOOR * torch.eye(draws.shape[2]).to(draws).double()
    covariance = _INFLATION * shrunk_covariance(draws.double()) + floor
    factor = torch.linalg.cholesky(covariance).to(draws)
    return DenseGaussian(given.colour(draws.mean(dim=1)), given.factor @ factor)


def _fitted(
    model: GenerativeModel,
    images: Tensor,
    network: nn.Module | RefinedStart | None,
    num_leapfrogs: int,
    seed: int,
    progress: Callable[[int], None],
) -> Starts:
    """Fit to the draws of HMC on each image's posterior, eagerly: compiling would take longer."""
    pieces = []
    for first, rows in chunks_for_memory(model, images, _CHAINS):
        generator = seeded_generator(images.device, seed, "ais.fit", first)
        chains = _FittingChains(model, rows, network, num_leapfrogs, generator, progress)
        chains.settle()
        pieces.append(chains.fit())
    gaussians, centres, missed = zip(*pieces, strict=True)
    dense = DenseGaussian(*(torch.cat(parts) for parts in zip(*gaussians, strict=True)))
    return Starts(dense, torch.cat(centres), torch.cat(missed))


def _drawn(
    network: nn.Module | RefinedStart,
    images: Tensor,
    count: int,
    latent_dim: int,
    generator: torch.Generator,
) -> Tensor:
    """Draw so many points for each image from the Gaussian of an encoder or of coordinates."""
    if isinstance(network, RefinedStart):
        given = given_gaussians(network.network, images, latent_dim)
        return given.colour(standard_normal(given.mean.repeat_interleave(count, dim=0), generator))
    q = encoded(network, images, latent_dim)
    return DiagonalGaussian(*(part.repeat_interleave(count, dim=0) for part in q)).sample(generator)


class _FittingChains:
    """32 chains for each of n images, eight of a network if there is one, others annealed."""

    def __init__(
        self,
        model: GenerativeModel,
        rows: Tensor,
        network: nn.Module | RefinedStart | None,
        num_leapfrogs: int,
        generator: torch.Generator,
        progress: Callable[[int], None],
    ) -> None:
        self.energy, self.generator = model.energy(rows), generator
        self.progress = progress
        self.num_leapfrogs = _crossing_leapfrogs(model.latent_dim, num_leapfrogs)
        self.shape = len(rows) // _CHAINS, _CHAINS, model.latent_dim
        self.from_q = 0 if network is None else _FROM_Q
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
        if network is not None:
            draws = _drawn(network, images, self.from_q, model.latent_dim, generator)
            position = torch.cat([draws.view(len(images), self.from_q, -1), position], dim=1)
        self.state = value_and_gradient(self.energy, position.flatten(0, 1))
        progress(len(rows))
        log_step_size = tuned.step_sizes[-1].log()
        self.tuning = StepSizes(self.num_leapfrogs, log_step_size, _CHAINS, _ACCEPTANCE)
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
