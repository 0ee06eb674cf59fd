"""Deep latent Gaussian models: training with learned MCMC, log-likelihoods and inpainting."""

from dglm.ais import (
    AISResult,
    AISSettings,
    bidirectional_bounds,
    estimate_log_likelihood,
)
from dglm.callbacks import ReversibilityMonitor, Safeguard
from dglm.coordinates import AmortizedPreconditioned, GaussianNetwork
from dglm.gaussian import DiagonalGaussian
from dglm.importance import importance_weighted_bound
from dglm.inpainting import KernelSteps, inpaint
from dglm.likelihoods import Bernoulli, Gaussian
from dglm.model import GenerativeModel
from dglm.module import DGLM
from dglm.networks import ConvolutionalDecoder, ConvolutionalEncoder, Decoder, Encoder
from dglm.posterior import long_chains, principal_axes
from dglm.starts import FittedStart, RefinedStart

__all__ = [
    "DGLM",
    "AISResult",
    "AISSettings",
    "AmortizedPreconditioned",
    "Bernoulli",
    "ConvolutionalDecoder",
    "ConvolutionalEncoder",
    "Decoder",
    "DiagonalGaussian",
    "Encoder",
    "FittedStart",
    "Gaussian",
    "GaussianNetwork",
    "GenerativeModel",
    "KernelSteps",
    "RefinedStart",
    "ReversibilityMonitor",
    "Safeguard",
    "bidirectional_bounds",
    "estimate_log_likelihood",
    "importance_weighted_bound",
    "inpaint",
    "long_chains",
    "principal_axes",
]
