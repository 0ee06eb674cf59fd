"""Long chains on p(z|x), the reference of short ones, and the shape along its principal axes."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dglm.precision import full_precision
from samplers import Chains, Energy, Kernel, sample_chunks
from samplers.adaptation import Moments
from samplers.chains import Snapshot
from samplers.io import Resumable
from samplers.kernel import Context

EDGES = torch.linspace(-6, 6, 121, dtype=torch.float64)
"""Ends of the histogram's bins in standard deviations; the outer bins reach to infinity."""

_CHUNK = 50
_KEPT_DRAWS = 200
_SAVE_SECONDS = 60.0


class Estimate(NamedTuple):
    """A figure and its standard error, 0-d, or one for each coordinate, (D,)."""

    value: Tensor
    standard_error: Tensor


class PrincipalAxes(NamedTuple):
    """The two directions in which a distribution is widest, and its scale in all others."""

    mean: Tensor
    """(D,)."""
    std: Tensor
    """Standard deviations of the coordinates, (D,)."""
    directions: Tensor
    """Orthonormal rows, the widest first, (2, D); the largest coordinate of each is positive."""
    scale: Tensor
    """Standard deviations in these directions, (2,)."""

    @classmethod
    def of(cls, moments: Moments) -> "PrincipalAxes":
        """Return the axes of a distribution with the given mean and covariance, in float64.

        Raises:
            ValueError: There are fewer than two coordinates, or one does not vary.
        """
        mean, covariance = moments.mean.double(), moments.covariance.double()
        if len(mean) < 2:
            raise ValueError(f"principal axes need at least 2 coordinates, got {len(mean)}")
        if not (covariance.diagonal() > 0).all():
            raise ValueError("the draws of a coordinate are all equal: the chains did not move")
        variances, vectors = torch.linalg.eigh(covariance)
        directions = vectors[:, -2:].flip(1).T
        largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
        scale = variances[-2:].flip(0).sqrt()
        return cls(mean, covariance.diagonal().sqrt(), directions * largest.sign(), scale)

    def project(self, draws: Tensor) -> Tensor:
        """Return draws (…, D) along the two axes in standard deviations, (…, 2)."""
        return (draws.double() - self.mean) @ self.directions.T / self.scale


class ChainMeans(NamedTuple):
    """Means over the draws of each chain, at a memory that does not grow with its length.

    Chains are independent of each other, so that the spread between them gives the standard error
    of any smooth function of their means, however autocorrelated each of them is.
    """

    powers: Tensor
    """Of u, u², u³ and u⁴, where u is the draw along the first principal axis, (chain, 4)."""
    histogram: Tensor
    """The share of draws in each bin of u, (chain, bin)."""
    coordinates: Tensor
    """Of y, y² and y⁴, where y are the standardised coordinates, (chain, 3, D)."""

    @classmethod
    def of(cls, axes: PrincipalAxes, draws: Tensor) -> "ChainMeans":
        """Return the means over draws (chain, draw, D)."""
        u = axes.project(draws)[..., 0].contiguous()
        powers = torch.stack([u.pow(power).mean(dim=1) for power in (1, 2, 3, 4)], dim=1)
        bins = torch.bucketize(u, EDGES[1:-1])
        histogram = u.new_zeros(len(u), len(EDGES) - 1)
        histogram.scatter_add_(1, bins, torch.full_like(u, 1 / u.shape[1]))
        y = (draws.double() - axes.mean) / axes.std
        coordinates = torch.stack([y.pow(power).mean(dim=1) for power in (1, 2, 4)], dim=1)
        return cls(powers, histogram, coordinates)

    def mixed(self, other: "ChainMeans", weight: float) -> "ChainMeans":
        """Return the means (1 - w) · self + w · other."""
        return ChainMeans(*(torch.lerp(*pair, weight) for pair in zip(self, other, strict=True)))

    def skewness(self) -> Estimate:
        r"""Return the skewness along the first axis.

        .. math:: E[(u - \bar u)^3] / σ^3
        """
        return between_chains(_skewness, self.powers)

    def excess_kurtosis(self) -> Estimate:
        r"""Return the excess kurtosis along the first axis, 0 for a Gaussian.

        .. math:: E[(u - \bar u)^4] / σ^4 - 3
        """
        return between_chains(_excess_kurtosis, self.powers)

    def effective_sample_size(self, power: int = 1) -> Estimate:
        r"""Return how many independent draws all chains together are worth, for each coordinate.

        .. math:: \mathrm{ESS} = C \operatorname{Var}(y) / \operatorname{Var}(\bar y_c)

        for C chains with means ȳ_c: no lags are cut off, unlike in estimates from the
        autocorrelation. It supposes that the chains have converged, which R̂ tells.

        Arguments:
            power: 1 for y, or 2 for y², which chains that jump from side to side do not flatter.
        """
        mean, square = self.coordinates[:, power - 1], self.coordinates[:, power]
        features = torch.stack([mean, mean.square(), square], dim=1)
        worth = between_chains(_variance_ratio, features)
        chains = len(mean) - 1  # as the variance of their means is taken around their own mean
        return Estimate(chains * worth.value, chains * worth.standard_error)


class LongChains(NamedTuple):
    """What is kept of many long chains."""

    means: ChainMeans
    """Over all draws of each chain, for figures of shape and their errors."""
    draws: Tensor
    """At most 200 draws of each chain, evenly spaced: for pictures and R̂, (chain, kept, D)."""
    acceptance: Tensor
    """Mean acceptance probability of each chain, (chain,)."""
    divergence: Tensor
    """Share of failed steps of each chain, (chain,)."""
    gradient_evaluations: int
    """Of all chains together."""


@full_precision()
@torch.no_grad()
def long_chains(
    kernel: Kernel,
    energy: Energy,
    position: Tensor,
    num_steps: int,
    axes: PrincipalAxes,
    generator: torch.Generator,
    context: Context = None,
    progress: Callable[[int], object] = lambda steps: None,
    checkpoint: Path | None = None,
) -> LongChains:
    """Run chains on p(z|x) and look at them along its principal axes, at constant memory.

    Arguments:
        kernel: Not adapted.
        energy: U of one image, from (chain, D) to (chain,).
        position: Where the chains start, (chain, D), after their warm-up.
        num_steps: Metropolis-Hastings steps of each chain.
        axes: Found beforehand, from other draws than these.
        generator: Of the noise.
        context: As returned by ``kernel.embed``.
        progress: Called with the number of steps made since the last call; an exception that it
            raises ends the run, which is saved first.
        checkpoint: A file to save into once a minute and to go on from, where it exists; the
            resumed run repeats the uninterrupted one.

    Raises:
        ValueError: ``num_steps`` is below 1, the energy is not finite where a chain starts, or the
            checkpoint is damaged or of another run.
    """
    run = _LongRun(position, num_steps, axes, generator)
    saved = Resumable(checkpoint, run.start)
    if (content := saved.load()) is not None:
        run.resume(content)
        progress(run.done)
    saved_at = time.monotonic()
    for chunk, snapshot in run.rest(kernel, energy, generator, context):
        run.add(chunk, snapshot)
        due = run.done == num_steps or time.monotonic() - saved_at > _SAVE_SECONDS
        try:
            progress(chunk.draws.shape[1])
        except BaseException:
            due = True
            raise
        finally:
            if due:
                saved.save(run.state())
                saved_at = time.monotonic()
    generator.set_state(run.end["generator"].cpu())  # that of a snapshot is another one
    gradients = len(position) * (num_steps * kernel.num_leapfrogs + 1)
    acceptance, divergence = run.rates
    return LongChains(run.means, torch.cat(run.kept, dim=1), acceptance, divergence, gradients)


class _LongRun:
    """Long chains between two chunks.

    The position and the generator at the start, the length and the axes tell one run from another:
    they depend on all else.
    """

    means: ChainMeans
    rates: Tensor  # of acceptance and divergence, (2, chain)
    end: Snapshot  # of the last chunk

    def __init__(
        self, position: Tensor, num_steps: int, axes: PrincipalAxes, generator: torch.Generator
    ) -> None:
        self.position, self.num_steps, self.axes = position, num_steps, axes
        self.start = {
            "position": position.cpu(),
            "generator": generator.get_state(),
            "num_steps": num_steps,
            "axes": axes._asdict(),
        }
        self.thin = -(-num_steps // _KEPT_DRAWS)
        self.done = 0
        self.kept: list[Tensor] = []

    def rest(
        self, kernel: Kernel, energy: Energy, generator: torch.Generator, context: Context
    ) -> Iterator[tuple[Chains, Snapshot]]:
        """Return the chunks that are left."""
        if self.done == self.num_steps > 0:
            return iter(())
        start, noise = (self.end, None) if self.done else (self.position, generator)
        left = self.num_steps - self.done
        return sample_chunks(
            kernel, energy, start, left, chunk_size=_CHUNK, context=context, generator=noise
        )

    def add(self, chunk: Chains, snapshot: Snapshot) -> None:
        """Take a chunk into the means, and keep each ``thin``-th draw."""
        means = ChainMeans.of(self.axes, chunk.draws)
        rates = torch.stack([chunk.acceptance, chunk.diverging.to(chunk.acceptance)]).mean(dim=2)
        self.kept.append(
            chunk.draws[:, (self.thin - 1 - self.done) % self.thin :: self.thin].clone()
        )
        if self.done == 0:
            self.means, self.rates = means, rates
        size = chunk.draws.shape[1]
        self.done += size
        self.means = self.means.mixed(means, size / self.done)
        self.rates = torch.lerp(self.rates, rates, size / self.done)
        self.end = snapshot

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on."""
        return {
            "end": self.end,
            "done": self.done,
            "means": tuple(self.means),
            "rates": self.rates,
            "kept": self.kept,
        }

    def resume(self, content: dict[str, Any]) -> None:
        """Go on from a state."""
        end, device = content["end"], self.position.device
        self.end = Snapshot(
            position=end["position"].to(device),
            energy=end["energy"].to(device),
            gradient=end["gradient"].to(device),
            extra=tuple(part.to(device) for part in end["extra"]),
            generator=end["generator"],
        )
        self.done, self.kept = content["done"], content["kept"]
        self.means, self.rates = ChainMeans(*content["means"]), content["rates"]


@full_precision()
@torch.no_grad()
def principal_axes(
    kernel: Kernel,
    energy: Energy,
    position: Tensor,
    num_steps: int,
    generator: torch.Generator,
    context: Context = None,
    progress: Callable[[int], object] = lambda steps: None,
) -> tuple[PrincipalAxes, Tensor]:
    """Warm chains up; return the axes of the second half of their draws and where they end.

    The arguments are those of :func:`long_chains`.

    Raises:
        ValueError: As there, or z has one coordinate only, or one that does not move.
    """
    warm_up, done, dim = num_steps // 2, 0, position.shape[1]
    moments = Moments(torch.zeros(dim).double(), torch.zeros(dim, dim).double())
    chunks = sample_chunks(
        kernel, energy, position, num_steps, chunk_size=_CHUNK, context=context, generator=generator
    )
    for chunk, _ in chunks:
        late = chunk.draws[:, max(0, warm_up - done) :]
        done += chunk.draws.shape[1]
        progress(chunk.draws.shape[1])
        if late.numel():
            found = Moments.of(late.double().flatten(0, 1))
            moments = moments.mixed(found, late.shape[1] / (done - warm_up))
    return PrincipalAxes.of(moments), chunk.draws[:, -1].to(position)


def between_chains(statistic: Callable[[Tensor], Tensor], features: Tensor) -> Estimate:
    r"""Estimate a smooth function of expectations from independent chains, by the delta method.

    .. math::
        \hat θ = θ(\bar f), \quad
        \mathrm{SE}^2 = \tfrac{1}{C (C - 1)} \sum_c (∇θ(\bar f) · (f_c - \bar f))^2

    Arguments:
        statistic: θ, from expectations (K, …) to (…), each from its own column.
        features: Each chain's estimates f_c of the expectations, (C, K, …).

    Raises:
        ValueError: There are fewer than two chains.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"errors from the spread between chains need at least 2, got {count}")
    mean = features.mean(dim=0)
    slope = torch.func.grad(lambda expectation: statistic(expectation).sum())(mean)
    influence = (slope * (features - mean)).sum(dim=1)
    return Estimate(statistic(mean), influence.std(dim=0) / count**0.5)


def _skewness(powers: Tensor) -> Tensor:
    first, second, third, _ = powers
    variance = second - first.square()
    return (third - 3 * first * second + 2 * first.pow(3)) / variance.pow(1.5)


def _excess_kurtosis(powers: Tensor) -> Tensor:
    first, second, third, fourth = powers
    variance = second - first.square()
    central = fourth - 4 * first * third + 6 * first.square() * second - 3 * first.pow(4)
    return central / variance.square() - 3


def _variance_ratio(features: Tensor) -> Tensor:
    mean, squared_mean, square = features
    return (square - mean.square()) / (squared_mean - mean.square())
