"""Deep latent Gaussian models: training with learned MCMC, log-likelihoods and inpainting."""

from dglm.ais import (
    AISResult,
    AISSettings,
    BidirectionalBounds,
    bidirectional_bounds,
    estimate_log_likelihood,
)
from dglm.callbacks import ReversibilityMonitor, Safeguard, TrainingFailed
from dglm.chain import Chain
from dglm.coordinates import AmortizedPreconditioned, GaussianNetwork
from dglm.gaussian import DiagonalGaussian
from dglm.importance import ImportanceResult, importance_weighted_bound
from dglm.inpainting import KernelSteps, inpaint
from dglm.likelihoods import Bernoulli, Gaussian, Likelihood
from dglm.model import GenerativeModel
from dglm.module import DGLM
from dglm.networks import ConvolutionalDecoder, ConvolutionalEncoder, Decoder, Encoder
from dglm.posterior import LongChains, long_chains, principal_axes
from dglm.shape import ChainMeans, Estimate, PrincipalAxes
from dglm.starts import FittedStart

__all__ = [
    "DGLM",
    "AISResult",
    "AISSettings",
    "AmortizedPreconditioned",
    "Bernoulli",
    "BidirectionalBounds",
    "Chain",
    "ChainMeans",
    "ConvolutionalDecoder",
    "ConvolutionalEncoder",
    "Decoder",
    "DiagonalGaussian",
    "Encoder",
    "Estimate",
    "FittedStart",
    "Gaussian",
    "GaussianNetwork",
    "GenerativeModel",
    "ImportanceResult",
    "KernelSteps",
    "Likelihood",
    "LongChains",
    "PrincipalAxes",
    "ReversibilityMonitor",
    "Safeguard",
    "TrainingFailed",
    "bidirectional_bounds",
    "estimate_log_likelihood",
    "importance_weighted_bound",
    "inpaint",
    "long_chains",
    "principal_axes",
]
