"""Importance weights, and the importance-weighted bound of the log-likelihood."""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dglm.annealing import chunks_for_memory
from dglm.gaussian import DiagonalGaussian
from dglm.model import GenerativeModel
from dglm.precision import full_precision
from dglm.starts import encoded
from samplers import seeded_generator

_SAMPLES_AT_ONCE = 100


class ImportanceResult(NamedTuple):
    """Importance-weighted bounds and what they rest on, float64, on the CPU."""

    log_likelihood: Tensor
    """The bound of log p(x) of each image, (N,) nats."""
    standard_error: Tensor
    """Of each bound as an estimate of its own expectation, by the delta method, (N,) nats.

    NaN where the bound rests on less than two samples.
    """
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
    images = model.observations(images)
    at_once = min(num_samples, _SAMPLES_AT_ONCE)
    pieces = []
    for first, rows in chunks_for_memory(model, images, at_once):
        generator = seeded_generator(images.device, seed, "importance", first)
        own = encoded(encoder, rows[::at_once], model.latent_dim)
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
    unknown = effective < min(2, (1 + num_samples) / 2)
    if unknown.any():
        warnings.warn(
            f"the importance-weighted bounds of {int(unknown.sum())} of {len(images)} images rest "
            "on less than two samples: their errors are unknown; take more samples, or AIS",
            stacklevel=2,
        )
    error = torch.where(unknown, torch.nan, spread.sqrt())
    return ImportanceResult(first_moment - math.log(num_samples), error, effective)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Return log((1/C) Σ exp(w)) over the last dimension."""
    return log_weights.logsumexp(dim=-1) - math.log(log_weights.shape[-1])


def log_mean_standard_error(log_weights: Tensor) -> Tensor:
    r"""Return the standard error of the log of a mean weight, by the delta method.

    .. math:: \mathrm{se} = \frac{\mathrm{sd}(w)}{\bar w \sqrt{C}}

    NaN where the weights do not tell it: for one chain, where one outweighs all others, or where
    the larger weights spread so widely that the mean of log-normal ones would need more than C of
    them, :math:`e^{v} > C` for a variance v of their logarithms.

    Arguments:
        log_weights: (N, C).
    """
    count = log_weights.shape[-1]
    if count == 1:
        return torch.full_like(log_weights[..., 0], torch.nan)
    ratios = (log_weights - log_mean_exp(log_weights)[..., None]).exp()
    error = ratios.std(dim=-1) / math.sqrt(count)
    above = (log_weights - log_weights.quantile(0.5, dim=-1, keepdim=True)).clamp(min=0)
    spread = 2 * above.square().mean(dim=-1)
    few = weight_effective_sample_size(log_weights) < min(2.0, (1 + count) / 2)
    return torch.where(few | ~(spread < math.log(count)), torch.nan, error)


def weight_effective_sample_size(log_weights: Tensor) -> Tensor:
    """Return (Σw)² / Σw² over the last dimension, for log-weights."""
    return (2 * log_weights.logsumexp(dim=-1) - (2 * log_weights).logsumexp(dim=-1)).exp()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of per-image values and its standard error over images, NaN for one."""
    values = values.double()
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(values.mean()), error
