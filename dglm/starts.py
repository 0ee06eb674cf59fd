"""Where annealed importance sampling starts: the prior, a network, or fits to the posteriors."""

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
_REFINING_CHAINS, _REFINING_STEPS = 16, 8
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
    """q(z|x): from x to mean and log standard deviation, or to a DenseGaussian."""


class RefinedStart(NamedTuple):
    """Start at the Gaussian that a network gives to each image, refined by short chains from it.

    A tenth of the cost of fits, where the network is that of a kernel's coordinates.
    """

    network: nn.Module
    """From x to a DenseGaussian, as a :class:`dglm.GaussianNetwork`."""


Start = nn.Module | Literal["prior", "fitted"] | FittedStart | RefinedStart
"""Where chains start: at the prior, at the q(z|x) of an encoder, or at fits to the posteriors.

Fits find modes that the encoder misses, on each image, and "fitted" needs no encoder. A network
alone is looked at for them on five images of a set, by fits.
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
    """Whether chains from the prior found a mode that those of the encoder had missed, (n,)."""

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


def named_start(name: StartName, encoder: nn.Module, coordinates: nn.Module | None) -> Start:
    """Return where annealed importance sampling starts, in the words of the commands.

    Raises:
        ValueError: The start is at coordinates, and there are none.
    """
    if name == "coordinates":
        if coordinates is None:
            raise ValueError(
                "this model's kernel has no coordinates to start at: choose start fitted, or "
                "train with model.coordinates true"
            )
        return RefinedStart(coordinates)
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
        ValueError: ``start`` is none of the five, or its network returns what is not finite, is of
            another kind or depends on the batch.
    """
    if start == "fitted":
        start = FittedStart()
    if isinstance(start, FittedStart):
        return _fitted(model, images, start.encoder, num_leapfrogs, seed, progress)
    if start == "prior":
        return Starts.around(_standard_normals(images, model.latent_dim))
    if not isinstance(start, (nn.Module, RefinedStart)):
        raise ValueError(
            "start must be 'prior', 'fitted', FittedStart, RefinedStart or an encoder module, got "
            f"{start!r}"
        )
    network = start if isinstance(start, nn.Module) else start.network
    gaussians = encoded(network, images, model.latent_dim)
    if isinstance(gaussians, DenseGaussian) != isinstance(start, RefinedStart):
        raise ValueError(
            "RefinedStart is for networks of dense Gaussians, a network itself for those of mean "
            f"and log standard deviation, got {start!r}"
        )
    if isinstance(gaussians, DenseGaussian):
        gaussians = _refined(model, images, gaussians, num_leapfrogs, seed, progress)
    starts = Starts.around(gaussians)
    some = torch.linspace(0, len(images) - 1, _looked_at(len(images))).round().long()
    found = _fitted(model, images[some], network, num_leapfrogs, seed, progress)
    starts.missed_modes[some] = found.missed_modes
    return starts


def encoded(
    encoder: nn.Module, images: Tensor, latent_dim: int
) -> DiagonalGaussian | DenseGaussian:
    """Return q(z|x) of images (N, D).

    Raises:
        ValueError: It is not finite, depends on the batch, or is not of ``latent_dim`` variables.
    """
    some = torch.cat([images[:2], torch.zeros_like(images[:1])])
    outputs = check_function("encoder", encoder, some)
    q = encoder(images)
    if isinstance(q, DenseGaussian):
        outputs[1] = outputs[1].diagonal(dim1=-2, dim2=-1)
    check_posterior(outputs, len(some), latent_dim)
    q = q if isinstance(q, DenseGaussian) else DiagonalGaussian(*q)
    if not all(bool(part.isfinite().all()) for part in q):
        raise ValueError("the encoder's q(z|x) is not finite: start at the prior, or train it anew")
    return q


def fit_gradients(num_images: int, start: Start | StartName, num_leapfrogs: int) -> int:
    """Return the gradients that finding q₀ of so many images takes, and looking at an encoder."""
    if start == "prior":
        return 0
    refining = 0
    if start == "coordinates" or isinstance(start, RefinedStart):
        refining = num_images * _REFINING_CHAINS * (1 + 2 * _REFINING_STEPS * num_leapfrogs)
    encoder = start.encoder if isinstance(start, FittedStart) else start
    with_encoder = encoder not in (None, "fitted")
    if not (start == "fitted" or isinstance(start, FittedStart)):
        num_images = _looked_at(num_images)
    annealed = _CHAINS - _FROM_Q if with_encoder else _CHAINS
    annealing = annealed * pilot_gradients(_TEMPERATURES, num_leapfrogs)
    return refining + num_images * (annealing + _CHAINS * (1 + 2 * _STEPS * num_leapfrogs))


def _looked_at(num_images: int) -> int:
    return min(num_images, _LOOKED_AT)


def _standard_normals(rows: Tensor, dim: int) -> DiagonalGaussian:
    zeros = rows.new_zeros(len(rows), dim)
    return DiagonalGaussian(zeros, zeros)


def _refined(
    model: GenerativeModel,
    images: Tensor,
    gaussians: DenseGaussian,
    num_leapfrogs: int,
    seed: int,
    progress: Callable[[int], None],
) -> DenseGaussian:
    """Fit Gaussians anew, to draws of short chains of HMC in their own coordinates."""
    pieces = []
    for first, rows in chunks_for_memory(model, images, _REFINING_CHAINS):
        generator = seeded_generator(images.device, seed, "ais.refinement", first)
        own = slice(first, first + len(rows) // _REFINING_CHAINS)
        given = DenseGaussian(*(part[own] for part in gaussians))
        path = Starts.around(given).path(model, rows)
        position = path.start.sample(generator)
        path.beta = 1.0
        state = path.value_and_gradient(position)
        progress(len(rows))
        tuning = StepSizes(
            num_leapfrogs, rows.new_zeros(len(given.mean)), _REFINING_CHAINS, _ACCEPTANCE
        )
        steps = []
        for step in range(2 * _REFINING_STEPS):
            state = tuning.step(state, path, generator, tune=step < _REFINING_STEPS)
            progress(len(rows) * num_leapfrogs)
            steps.append(state.position.view(len(given.mean), _REFINING_CHAINS, -1))
        pieces.append(_corrected(given, torch.cat(steps[_REFINING_STEPS:], dim=1)))
    return DenseGaussian(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _corrected(given: DenseGaussian, draws: Tensor) -> DenseGaussian:
    """Return the Gaussians of draws w (n, S, D), as if D more of each were of the given one."""
    dim = draws.shape[2]
    mean = draws.mean(dim=1)
    away = (draws - mean[:, None]).double()
    covariance = (away.mT @ away + dim * torch.eye(dim).to(away)) / (draws.shape[1] + dim)
    factor = torch.linalg.cholesky(_INFLATION * covariance).to(draws)
    return DenseGaussian(given.colour(mean), given.factor @ factor)


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
            draws = type(q)(*repeated).sample(generator)
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
