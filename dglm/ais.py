"""The log-likelihood of a generative model: annealed importance sampling, and bounds beside it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from dglm.annealing import (
    Annealed,
    Schedule,
    anneal,
    chunks_for_memory,
    log_mean_exp,
    log_mean_standard_error,
    pilot_gradients,
    temperatures,
    tune_step_sizes,
    weight_effective_sample_size,
)
from dglm.gaussian import DenseGaussian, DiagonalGaussian
from dglm.model import GenerativeModel
from dglm.precision import full_precision
from dglm.starts import (
    Gaussians,
    Start,
    annealed_path,
    encoded,
    fit_gradients,
    of_images,
    starting_gaussians,
)
from samplers import HMC, seeded_generator

StartName = Literal["prior", "encoder", "fitted"]
"""A start in the words of the commands; the encoder is the model's own."""

_PILOT_CHAINS = 128
_PILOT_STREAM, _CHAIN_STREAM, _REVERSE_STREAM = 0, 1, 2
_SIMULATION_STREAM, _IMPORTANCE_STREAM = 3, 4
_SAMPLES_AT_ONCE = 100


@dataclass(frozen=True)
class AISSettings:
    """How much work an estimate of log p(x) is.

    Args:
        num_chains: Chains for each image.
        num_temperatures: Changes of temperature.
        num_leapfrogs: Leapfrogs of each transition.
        start: Where the chains start: at the prior, at the encoder's q(z|x), from where fewer
            temperatures are needed, or at Gaussians fitted to the posteriors, from where few are.
            Only the prior finds modes that chains from q(z|x) do not reach.
        schedule: Spacing of the temperatures.
        seed: Seed of all randomness.
        compile: Compile the transition: faster per gradient, once some twenty seconds are spent.

    Raises:
        ValueError: A count is below 1, the seed is negative, or a name is unknown.
    """

    num_chains: int = 16
    num_temperatures: int = 100
    num_leapfrogs: int = 5
    start: StartName = "fitted"
    schedule: Schedule = "sigmoid"
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
        for name, choices in (("start", StartName), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(get_args(choices))
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")


class AISResult(NamedTuple):
    """Estimates of log p(x) and what they rest on, on the CPU."""

    log_likelihood: Tensor
    """Estimate of log p(x) of each image, float64, (N,) nats; a lower bound in expectation."""
    standard_error: Tensor
    """Of each estimate, from the spread of weights over chains, (N,) nats; NaN for one chain."""
    log_weights: Tensor
    """Of each chain, float64, (N, chains) nats."""
    acceptance: Tensor
    """Mean acceptance probability, (N,); 0 with one temperature, which takes no step."""
    gradient_evaluations: int
    """Gradients of log p(x|z), over all images and chains, of pilot and fit, too."""

    @property
    def effective_sample_size(self) -> Tensor:
        """(Σw)² / Σw² of each image's weights, (N,), between 1 and the number of chains."""
        return weight_effective_sample_size(self.log_weights)


@full_precision()
@torch.no_grad()
def estimate_log_likelihood(
    model: GenerativeModel,
    images: Tensor,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    num_leapfrogs: int = 10,
    start: Start = "prior",
    seed: int = 0,
    schedule: Schedule = "sigmoid",
    compile: bool = False,
    progress: Callable[[int], None] = lambda gradients: None,
) -> AISResult:
    r"""Estimate log p(x) of each image by annealed importance sampling.

    .. math:: \log \hat p(x) = \log \frac{1}{C} \sum_c \exp \sum_t (β_t - β_{t-1})
        \bigl(\log p(x, z_{t-1}^c) - \log q_0(z_{t-1}^c)\bigr)

    The estimate of p(x) is unbiased, that of log p(x) a lower bound in expectation. Transitions
    are HMC, with a step size for each temperature that a pilot run has tuned and that is then kept.

    Arguments:
        model: p(x, z).
        images: Observations, (N, D), on the model's device.
        num_chains: C, chains an image.
        num_temperatures: T, changes of temperature; T - 1 transitions lie between them.
        num_leapfrogs: Leapfrogs a transition.
        start: q₀: "prior", an encoder, from which fewer temperatures are needed, or
            ``FittedStart(encoder)``, from which few are.
        seed: All randomness is a function of it.
        schedule: Spacing of the temperatures.
        compile: Compile the transition: faster per gradient, once some twenty seconds are spent.
        progress: Called with the number of gradients taken since the last call.

    Raises:
        ValueError: A count is below 1, or the images cannot be this model's.

    References:
        Annealed importance sampling (Neal, 2001).
        On the quantitative analysis of decoder-based generative models (Wu, Burda, Salakhutdinov
        and Grosse, 2017).

    Example:
        >>> import torch
        >>> from dglm import GenerativeModel, estimate_log_likelihood
        >>> model = GenerativeModel(torch.nn.Linear(2, 6), latent_dim=2)
        >>> images, _ = model.sample(3)
        >>> result = estimate_log_likelihood(model, images, num_chains=4, num_temperatures=10)
        >>> result.log_likelihood.shape, result.log_weights.shape
        (torch.Size([3]), torch.Size([3, 4]))
    """
    check_counts(num_chains=num_chains, num_leapfrogs=num_leapfrogs)
    model.check_observations(images)
    betas = temperatures(num_temperatures, schedule)
    kernel = transition(num_leapfrogs, images.device, compile)
    starts = starting_gaussians(model, images, start, num_leapfrogs, seed, progress)
    step_sizes = tuned_step_sizes(model, images, betas, num_leapfrogs, starts, seed, progress)
    pieces = annealed_chains(
        model, images, num_chains, betas, kernel, step_sizes, starts, seed, progress
    )
    cost = gradient_evaluations(len(images), num_chains, num_temperatures, num_leapfrogs, start)
    return summarise(pieces, num_chains, cost)


def annealed_chains(
    model: GenerativeModel,
    images: Tensor,
    num_chains: int,
    betas: Tensor,
    kernel: HMC,
    step_sizes: Tensor,
    starts: Gaussians,
    seed: int,
    progress: Callable[[int], None],
    exact: Tensor | None = None,
) -> list[Annealed]:
    """Anneal the chains of all images, in pieces that fit in memory.

    From draws of q₀; or back from ``exact`` posterior draws (N, latent_dim), one an image, which
    all its chains share, with ``betas`` and ``step_sizes`` in reverse order.
    """
    pieces = []
    stream = _CHAIN_STREAM if exact is None else _REVERSE_STREAM
    for first, rows in chunks_for_memory(model, images, num_chains):
        generator = seeded_generator(images.device, seed, stream, first)
        own = slice(first, first + len(rows) // num_chains)
        start = of_images(starts, own)
        path = annealed_path(model, rows, start)
        if exact is None:
            draws = path.start.sample(generator)
        else:
            draws = exact[own].repeat_interleave(num_chains, dim=0)
            if isinstance(start, DenseGaussian):
                draws = start.whiten(draws)
        counted = scaled(progress, len(rows))
        pieces.append(anneal(path, draws, betas, kernel, step_sizes, generator, counted))
    return pieces


def transition(num_leapfrogs: int, device: torch.device, compile: bool) -> HMC:
    """Return the kernel that moves the chains between two changes of temperature."""
    kernel = HMC(num_leapfrogs).to(device)
    if compile:
        kernel.compile()
    return kernel


def gradient_evaluations(
    num_images: int,
    num_chains: int,
    num_temperatures: int,
    num_leapfrogs: int,
    start: Start | StartName,
) -> int:
    """Return the gradients of log p(x|z) that an estimate takes, all of them."""
    pilot = _PILOT_CHAINS * pilot_gradients(num_temperatures, num_leapfrogs)
    annealed = chain_gradients(num_chains, num_temperatures, num_leapfrogs)
    return pilot + num_images * (annealed + fit_gradients(start, num_leapfrogs))


def chain_gradients(num_chains: int, num_temperatures: int, num_leapfrogs: int) -> int:
    """Return the gradients of the annealed chains of one image."""
    return num_chains * (1 + (num_temperatures - 1) * num_leapfrogs)


def join(results: Sequence[AISResult]) -> AISResult:
    """Return the results of consecutive sets of images as one."""
    log_likelihood, error, weights, acceptance = (
        torch.cat(parts) for parts in zip(*(result[:4] for result in results), strict=True)
    )
    cost = sum(result.gradient_evaluations for result in results)
    return AISResult(log_likelihood, error, weights, acceptance, cost)


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
    log_likelihood, error, weights, acceptance = (part[place.argsort()] for part in joined[:4])
    return AISResult(log_likelihood, error, weights, acceptance, joined.gradient_evaluations)


def summarise(pieces: list[Annealed], num_chains: int, gradient_evaluations: int) -> AISResult:
    """Turn the chains of consecutive images into estimates for each image."""
    log_weights = torch.cat([piece.log_weight for piece in pieces]).cpu().view(-1, num_chains)
    acceptance = torch.cat([piece.acceptance for piece in pieces]).cpu().view(-1, num_chains)
    return AISResult(
        log_mean_exp(log_weights),
        log_mean_standard_error(log_weights),
        log_weights,
        acceptance.mean(dim=1),
        gradient_evaluations,
    )


def check_counts(**counts: int) -> None:
    """Raise ValueError that names the first count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def tuned_step_sizes(
    model: GenerativeModel,
    images: Tensor,
    betas: Tensor,
    num_leapfrogs: int,
    starts: Gaussians,
    seed: int,
    progress: Callable[[int], None] = lambda gradients: None,
) -> Tensor:
    """Return step sizes tuned on images spread over the set."""
    rows = torch.arange(_PILOT_CHAINS, device=images.device) * len(images) // _PILOT_CHAINS
    path = annealed_path(model, images[rows], of_images(starts, rows))
    generator = seeded_generator(images.device, seed, _PILOT_STREAM)
    counted = scaled(progress, _PILOT_CHAINS)
    return tune_step_sizes(path, betas, num_leapfrogs, generator, counted)


def scaled(progress: Callable[[int], None], chains: int) -> Callable[[int], None]:
    """Turn a count of gradients over all chains into the count of each chain."""
    return lambda gradients: progress(gradients * chains)


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
    num_chains: int = 16,
    num_temperatures: int = 1000,
    num_leapfrogs: int = 10,
    start: Start = "prior",
    seed: int = 0,
    schedule: Schedule = "sigmoid",
    compile: bool = False,
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
        num_chains: C, chains an image in each direction.
        num_temperatures: T, changes of temperature.
        num_leapfrogs: Leapfrogs a transition.
        start: q₀: "prior", an encoder, or ``FittedStart(encoder)``.
        seed: All randomness is a function of it.
        schedule: Spacing of the temperatures.
        compile: Compile the transition: faster per gradient, once some twenty seconds are spent.
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
    check_counts(num_chains=num_chains, num_leapfrogs=num_leapfrogs)
    model.check_decoder()
    device = next(model.parameters(), torch.empty(0)).device
    images, z = model.sample(num_images, seeded_generator(device, seed, _SIMULATION_STREAM))
    betas = temperatures(num_temperatures, schedule)
    kernel = transition(num_leapfrogs, device, compile)
    starts = starting_gaussians(model, images, start, num_leapfrogs, seed, progress)
    step_sizes = tuned_step_sizes(model, images, betas, num_leapfrogs, starts, seed, progress)
    shared = starts, seed, progress
    forward = annealed_chains(model, images, num_chains, betas, kernel, step_sizes, *shared)
    reverse = annealed_chains(
        model, images, num_chains, betas.flip(0), kernel, step_sizes.flip(0), *shared, exact=z
    )
    sizes = num_chains, num_temperatures, num_leapfrogs
    cost = gradient_evaluations(num_images, *sizes, start)
    lower = summarise(forward, num_chains, cost)
    upper = summarise(reverse, num_chains, num_images * chain_gradients(*sizes))
    return BidirectionalBounds(lower.log_likelihood, -upper.log_likelihood, lower, upper)


class ImportanceResult(NamedTuple):
    """Importance-weighted bounds and what they rest on, float64, on the CPU."""

    log_likelihood: Tensor
    """The bound of log p(x) of each image, (N,) nats."""
    standard_error: Tensor
    """Of each bound as an estimate of its own expectation, by the delta method, (N,) nats."""
    effective_sample_size: Tensor
    """(Σw)² / Σw² of each image's weights, (N,)."""


@full_precision()
@torch.no_grad()
def importance_weighted_bound(
    model: GenerativeModel,
    encoder: nn.Module,
    images: Tensor,
    num_samples: int = 5000,
    seed: int = 0,
    progress: Callable[[int], None] = lambda samples: None,
) -> ImportanceResult:
    r"""Bound log p(x) from below by importance sampling from an encoder.

    .. math:: \log \frac{1}{K} \sum_k \frac{p(x, z_k)}{q(z_k|x)}, \quad z_k \sim q(z|x)

    It is cheap and low: where q misses part of the posterior, so do the weights, and their spread
    does not tell. Weights are accumulated in float64, in pieces of constant memory.

    Arguments:
        model: p(x, z).
        encoder: q(z|x): from x to mean and log standard deviation.
        images: Observations, (N, D).
        num_samples: K, at least 2.
        seed: All randomness is a function of it.
        progress: Called with the number of weights computed since the last call.

    Raises:
        ValueError: A count is too small, the images cannot be this model's, or q(z|x) is not
            finite or depends on the batch.

    References:
        Importance weighted autoencoders (Burda, Grosse and Salakhutdinov, 2016), Equation 8.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}")
    model.check_observations(images)
    at_once = min(num_samples, _SAMPLES_AT_ONCE)
    pieces = []
    for first, rows in chunks_for_memory(model, images, at_once):
        generator = seeded_generator(images.device, seed, _IMPORTANCE_STREAM, first)
        own = encoded(encoder, rows[::at_once])
        q = DiagonalGaussian(*(part.repeat_interleave(at_once, dim=0) for part in own))
        sums: list[Tensor] = []
        for begin in range(0, num_samples, at_once):
            z = q.sample(generator)
            weights = model.log_joint(rows, z).double() - q.log_prob(z).double()
            kept = weights.view(-1, at_once)[:, : num_samples - begin]
            sums.append(torch.stack([kept.logsumexp(dim=1), (2 * kept).logsumexp(dim=1)]))
            progress(kept.numel())
        pieces.append(torch.stack(sums).logsumexp(dim=0).cpu())
    first_moment, second_moment = torch.cat(pieces, dim=1)
    effective = (2 * first_moment - second_moment).exp()
    spread = (1 / effective - 1 / num_samples).clamp(min=0) * num_samples / (num_samples - 1)
    return ImportanceResult(first_moment - math.log(num_samples), spread.sqrt(), effective)
