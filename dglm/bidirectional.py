"""Bidirectional Monte Carlo: log p(x) between two bounds, on images that the model simulates."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dglm.ais import (
    AISResult,
    annealed_chains,
    chain_gradients,
    check_counts,
    gradient_evaluations,
    summarise,
    transition,
    tuned_step_sizes,
)
from dglm.annealing import Schedule, temperatures
from dglm.model import GenerativeModel
from dglm.precision import full_precision
from dglm.starts import Start, starting_gaussians
from samplers import seeded_generator

_SIMULATION_STREAM = 3


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
