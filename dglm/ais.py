"""Annealed importance sampling (AIS) and bidirectional Monte Carlo (BDMC)."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dglm.annealing import (
    Annealed,
    anneal,
    check_counts,
    chunks_for_memory,
    pilot_gradients,
    scaled,
    temperatures,
    tune_step_sizes,
)
from dglm.importance import (
    log_mean_exp,
    log_mean_standard_error,
    weight_effective_sample_size,
)
from dglm.model import GenerativeModel
from dglm.precision import full_precision
from dglm.starts import RefinedStart, Start, fit_gradients, starting_points
from samplers import HMC, seeded_generator
from samplers.hmc import JITTER

_PILOT_CHAINS = 4
_LOW_ACCEPTANCE = 0.1


@dataclass(frozen=True)
class AISSettings:
    """How much work an estimate of log p(x) is.

    Args:
        num_chains: Chains for each image.
        num_temperatures: Changes of temperature.
        num_leapfrogs: Leapfrogs of each transition.
        seed: Seed of all randomness.
        compile: Compile the transition: faster per gradient, once some twenty seconds are spent.

    Raises:
        ValueError: A count is below 1, or the seed is negative.
    """

    num_chains: int = 16
    num_temperatures: int = 100
    num_leapfrogs: int = 5
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        check_counts(
            num_chains=self.num_chains,
            num_temperatures=self.num_temperatures,
            num_leapfrogs=self.num_leapfrogs,
        )
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


class AISResult(NamedTuple):
    """Estimates of log p(x) and what they rest on, on the CPU."""

    log_likelihood: Tensor
    """Estimate of log p(x) of each image, float64, (N,) nats; a lower bound in expectation."""
    standard_error: Tensor
    """Of each estimate, from the spread of weights over chains, (N,) nats.

    NaN for one chain, and for images that are :attr:`unreliable`; or where chains started at an
    encoder, or at coordinates, that miss a mode.
    """
    log_weights: Tensor
    """Of each chain, float64, (N, chains) nats."""
    acceptance: Tensor
    """Mean acceptance probability, (N,); 0 with one temperature, which takes no step."""
    missed_modes: Tensor
    """Whether the network of the start missed a mode that chains from the prior found, (N,).

    Of a start that is no fit, five images are looked at.
    """
    gradient_evaluations: int
    """Gradients of log p(x|z), over all images and chains, of pilot and fit, too."""

    @property
    def effective_sample_size(self) -> Tensor:
        """(Σw)² / Σw² of each image's weights, (N,), between 1 and the number of chains."""
        return weight_effective_sample_size(self.log_weights)

    @property
    def unreliable(self) -> Tensor:
        """Whether no error is known, (N,).

        Where less than two chains count or they hardly move, or where the start misses a mode.
        """
        return self.standard_error.isnan()


def estimate_log_likelihood(
    model: GenerativeModel,
    images: Tensor,
    settings: AISSettings = AISSettings(),
    start: Start = "fitted",
    progress: Callable[[int], None] = lambda gradients: None,
) -> AISResult:
    r"""Estimate log p(x) of each image by annealed importance sampling.

    .. math:: \log \hat p(x) = \log \frac{1}{C} \sum_c \exp \sum_t (β_t - β_{t-1})
        \bigl(\log p(x, z_{t-1}^c) - \log q_0(z_{t-1}^c)\bigr)

    The estimate of p(x) is unbiased, that of log p(x) a lower bound in expectation. Transitions
    are HMC, with step sizes for each image and temperature that a pilot run has tuned and that are
    then kept.

    Arguments:
        model: p(x, z).
        images: Observations, (N, D), on the model's device.
        settings: How many chains, temperatures and leapfrogs, and the seed.
        start: q₀: "prior"; an encoder, from which fewer temperatures are needed, and which five
            images are looked at for missed modes of; ``RefinedStart(dglm.kernel)``, from which
            few are, looked at likewise; or ``FittedStart(encoder)``, from which few are, and which
            "fitted" is without an encoder.
        progress: Called with the number of gradients taken since the last call.

    Raises:
        ValueError: The images cannot be this model's, or the start is none of the five.

    Warns:
        UserWarning: Of images whose estimate is unreliable, or of which the start misses a mode.

    References:
        Annealed importance sampling (Neal, 2001).
        On the quantitative analysis of decoder-based generative models (Wu, Burda, Salakhutdinov
        and Grosse, 2017).

    Example:
        >>> import torch
        >>> from dglm import AISSettings, GenerativeModel, estimate_log_likelihood
        >>> model = GenerativeModel(torch.nn.Linear(2, 6), latent_dim=2)
        >>> images, _ = model.sample(3)
        >>> result = estimate_log_likelihood(model, images, AISSettings(num_temperatures=10))
        >>> result.log_likelihood.shape, result.log_weights.shape
        (torch.Size([3]), torch.Size([3, 16]))
    """
    result = quiet_estimate(model, images, settings, start, progress)
    warn_of(result)
    return result


@full_precision()
@torch.no_grad()
def quiet_estimate(
    model: GenerativeModel,
    images: Tensor,
    settings: AISSettings,
    start: Start,
    progress: Callable[[int], None],
) -> AISResult:
    """Estimate as :func:`estimate_log_likelihood` does, without its warnings."""
    images = model.observations(images)
    annealing = _Annealing(model, images, settings, start, progress)
    cost = gradient_evaluations(model, len(images), settings, start)
    return annealing.result(annealing.run(), cost)


class _Annealing:
    """q₀ and step sizes of some images, found once for the chains of both directions."""

    def __init__(
        self,
        model: GenerativeModel,
        images: Tensor,
        settings: AISSettings,
        start: Start,
        progress: Callable[[int], None],
    ) -> None:
        self.model, self.images = model, images
        self.settings, self.start, self.progress = settings, start, progress
        self.betas = temperatures(settings.num_temperatures)
        self.kernel = transition(settings.num_leapfrogs, images.device, settings.compile)
        leapfrogs, seed = settings.num_leapfrogs, settings.seed
        self.starts = starting_points(model, images, start, leapfrogs, seed, progress)
        self.step_sizes = self._tuned_step_sizes()

    def run(self, exact: Tensor | None = None) -> list[Annealed]:
        """Anneal the chains of all images, in pieces that fit in memory.

        From draws of q₀; or back to it from ``exact`` posterior draws (N, latent_dim), one an
        image, which all its chains share.
        """
        betas = self.betas if exact is None else self.betas.flip(0)
        step_sizes = self.step_sizes if exact is None else self.step_sizes.flip(0)
        stream = "ais.chains" if exact is None else "ais.reverse"
        chains, pieces = self.settings.num_chains, []
        for first, rows in chunks_for_memory(self.model, self.images, chains):
            generator = seeded_generator(rows.device, self.settings.seed, stream, first)
            own = slice(first, first + len(rows) // chains)
            starts = self.starts.of_images(own)
            path = starts.path(self.model, rows)
            if exact is None:
                draws = path.start.sample(generator)
            else:
                draws = starts.whiten(exact[own].repeat_interleave(chains, dim=0))
            counted = scaled(self.progress, len(rows))
            sizes = step_sizes[:, own]
            pieces.append(anneal(path, draws, betas, self.kernel, sizes, generator, counted))
        return pieces

    def result(self, pieces: list[Annealed], gradient_evaluations: int) -> AISResult:
        """Turn the chains of all images into estimates for each of them."""
        shape = len(self.images), self.settings.num_chains
        log_weights = torch.cat([piece.log_weight for piece in pieces]).cpu().view(shape)
        acceptance = torch.cat([piece.acceptance for piece in pieces]).cpu().view(shape)
        accepted = acceptance.mean(dim=1)
        error = log_mean_standard_error(log_weights)
        if self.settings.num_temperatures > 1:
            error = torch.where(accepted < _LOW_ACCEPTANCE, torch.nan, error)
        missed = self.starts.missed_modes
        if isinstance(self.start, (nn.Module, RefinedStart)):  # which fits cover
            error = torch.where(missed, torch.nan, error)
        return AISResult(
            log_mean_exp(log_weights), error, log_weights, accepted, missed, gradient_evaluations
        )

    def _tuned_step_sizes(self) -> Tensor:
        """Return step sizes tuned on a few chains of each image, (T - 1, N)."""
        leapfrogs, found = self.settings.num_leapfrogs, []
        for first, rows in chunks_for_memory(self.model, self.images, _PILOT_CHAINS):
            own = slice(first, first + len(rows) // _PILOT_CHAINS)
            path = self.starts.of_images(own).path(self.model, rows)
            generator = seeded_generator(rows.device, self.settings.seed, "ais.pilot", first)
            counted = scaled(self.progress, len(rows))
            tuned = tune_step_sizes(path, self.betas, leapfrogs, _PILOT_CHAINS, generator, counted)
            found.append(tuned.step_sizes)
        return torch.cat(found, dim=1)


def transition(num_leapfrogs: int, device: torch.device, compile: bool) -> HMC:
    """Return the kernel that moves the chains between two changes of temperature."""
    kernel = HMC(num_leapfrogs, jitter=JITTER).to(device)
    if compile:
        kernel.compile()
    return kernel


def gradient_evaluations(
    model: GenerativeModel, num_images: int, settings: AISSettings, start: Start
) -> int:
    """Return the gradients of log p(x|z) that an estimate takes, all of them."""
    pilot = _PILOT_CHAINS * pilot_gradients(settings.num_temperatures, settings.num_leapfrogs)
    fits = fit_gradients(num_images, model.latent_dim, start, settings.num_leapfrogs)
    return num_images * (pilot + chain_gradients(settings)) + fits


def chain_gradients(settings: AISSettings) -> int:
    """Return the gradients of the annealed chains of one image."""
    return settings.num_chains * (1 + (settings.num_temperatures - 1) * settings.num_leapfrogs)


def join(results: Sequence[AISResult]) -> AISResult:
    """Return the results of consecutive sets of images as one."""
    *tensors, costs = zip(*results, strict=True)
    log_likelihood, error, weights, acceptance, missed = map(torch.cat, tensors)
    return AISResult(log_likelihood, error, weights, acceptance, missed, sum(costs))


def gather(own: Sequence[AISResult]) -> AISResult:
    """Return the results of all processes as one; process r of W has the images r, r + W, ….

    Arguments:
        own: Of consecutive images of this process; it may have none.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return join(own)
    world_size = torch.distributed.get_world_size()
    shares = [own] * world_size
    torch.distributed.all_gather_object(shares, own)
    joined = join([result for share in shares for result in share])
    count = len(joined.log_likelihood)
    place = torch.cat([torch.arange(count)[rank::world_size] for rank in range(world_size)])
    order = place.argsort()
    log_likelihood, error, weights, acceptance, missed = (part[order] for part in joined[:5])
    return AISResult(
        log_likelihood, error, weights, acceptance, missed, joined.gradient_evaluations
    )


def warn_of(result: AISResult) -> None:
    """Warn of images whose estimate is unreliable, or of which the start misses a mode."""
    count, missed = len(result.log_likelihood), result.missed_modes
    weights_known = log_mean_standard_error(result.log_weights).isfinite()
    unreliable = result.unreliable & ~(missed & weights_known)  # which is told of below
    if result.log_weights.shape[1] > 1 and unreliable.any():
        warnings.warn(
            f"the log-likelihoods of {int(unreliable.sum())} of {count} images "
            f"({_places(unreliable)}) rest on less than two of their chains, or on chains that "
            "hardly move: they are too low by an unknown amount; take more temperatures, or "
            "another start",
            stacklevel=3,
        )
    if missed.any():
        warnings.warn(
            f"the network that chains start at misses a mode of the posterior of "
            f"{int(missed.sum())} of {count} images ({_places(missed)}), which chains from the "
            "prior found: FittedStart(encoder), in a command --start fitted, covers it; take more "
            "chains and temperatures to be sure",
            stacklevel=3,
        )


def _places(chosen: Tensor) -> str:
    """Return the places of the first few that are chosen."""
    places = chosen.nonzero()[:, 0].tolist()
    return ", ".join(map(str, places[:5])) + (", …" if len(places) > 5 else "")


class BidirectionalBounds(NamedTuple):
    """Bounds of log p(x) for simulated images, in expectation, and what they rest on."""

    lower: Tensor
    """From chains that end at the posterior, float64, (N,) nats."""
    upper: Tensor
    """From chains that start at an exact posterior draw, float64, (N,) nats."""
    forward: AISResult
    """The chains of the lower bound."""
    reverse: AISResult
    """The chains of the upper bound; its log_likelihood estimates log 1/p(x)."""

    @property
    def gap(self) -> float:
        """Mean of upper - lower over images, nats: at least the mean error of each bound."""
        return float((self.upper - self.lower).mean())

    @property
    def gap_standard_error(self) -> float:
        """Standard error of the gap, over images.

        The reverse chains of one image share its one exact draw, so that their spread tells
        nothing: images are the replicates.
        """
        difference = self.upper - self.lower
        return float(difference.std() / len(difference) ** 0.5)

    @property
    def gradient_evaluations(self) -> int:
        """Gradients of log p(x|z) of both directions."""
        return self.forward.gradient_evaluations + self.reverse.gradient_evaluations


@full_precision()
@torch.no_grad()
def bidirectional_bounds(
    model: GenerativeModel,
    num_images: int,
    settings: AISSettings = AISSettings(),
    start: Start = "fitted",
    progress: Callable[[int], None] = lambda gradients: None,
) -> BidirectionalBounds:
    r"""Bound log p(x) from both sides on images drawn from the model itself.

    With (x, z) simulated, z is an exact draw from p(z|x). Annealing from it to q₀ estimates 1/p(x)
    without bias, so that minus its logarithm bounds log p(x) from above in expectation, as
    annealing from q₀ does from below:

    .. math::
        E \log \tfrac{1}{C} \sum_c w_c \leq \log p(x)
        \leq -E \log \tfrac{1}{C} \sum_c \tilde w_c

    with the weights w of the way there and w̃ of the way back. The gap tells how far off such
    annealing is, for this model and for data like its own; on other data it is a guide, not a
    bound.

    Arguments:
        model: p(x, z).
        num_images: N, images to simulate; at least 2, for an error bar.
        settings: Of each direction.
        start: q₀, as for :func:`estimate_log_likelihood`.
        progress: Called with the number of gradients taken since the last call.

    Raises:
        ValueError: A count is too small, or the decoder is not a function of z alone.

    References:
        Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse, Ghahramani and
        Adams, 2015).
        On the quantitative analysis of decoder-based generative models (Wu, Burda, Salakhutdinov
        and Grosse, 2017).
    """
    if num_images < 2:
        raise ValueError(f"num_images must be at least 2 for an error bar, got {num_images}")
    model.check_decoder()
    device = next(model.parameters(), torch.empty(0)).device
    generator = seeded_generator(device, settings.seed, "ais.simulation")
    images, z = model.sample(num_images, generator)
    annealing = _Annealing(model, images, settings, start, progress)
    cost = gradient_evaluations(model, num_images, settings, start)
    lower = annealing.result(annealing.run(), cost)
    upper = annealing.result(annealing.run(exact=z), num_images * chain_gradients(settings))
    return BidirectionalBounds(lower.log_likelihood, -upper.log_likelihood, lower, upper)
