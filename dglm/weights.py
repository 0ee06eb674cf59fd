"""Importance weights, kept as logarithms."""

import math

import torch
from torch import Tensor


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Return log((1/C) Σ exp(w)) over the last dimension."""
    return log_weights.logsumexp(dim=-1) - math.log(log_weights.shape[-1])


def log_mean_standard_error(log_weights: Tensor) -> Tensor:
    r"""Return the standard error of the log of a mean weight, by the delta method.

    .. math:: \mathrm{se} = \frac{\mathrm{sd}(w)}{\bar w \sqrt{C}}

    Arguments:
        log_weights: (N, C); NaN for a single chain, which has no spread.
    """
    if log_weights.shape[-1] == 1:
        return torch.full_like(log_weights[..., 0], torch.nan)
    ratios = (log_weights - log_mean_exp(log_weights)[..., None]).exp()
    return ratios.std(dim=-1) / math.sqrt(log_weights.shape[-1])


def weight_effective_sample_size(log_weights: Tensor) -> Tensor:
    """Return (Σw)² / Σw² over the last dimension, for log-weights."""
    return (2 * log_weights.logsumexp(dim=-1) - (2 * log_weights).logsumexp(dim=-1)).exp()
