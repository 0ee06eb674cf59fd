"""The importance-weighted bound: a cheap third estimate of log p(x)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dglm.gaussian import DiagonalGaussian
from dglm.memory import chunks_for_memory
from dglm.model import GenerativeModel
from dglm.precision import full_precision
from dglm.starts import encoded
from samplers import seeded_generator

_STREAM = 4
_SAMPLES_AT_ONCE = 100


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
        generator = seeded_generator(images.device, seed, _STREAM, first)
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
