"""Deep latent Gaussian models: training with learned MCMC, log-likelihoods and inpainting."""

from dglm.ais import AISResult, estimate_log_likelihood
from dglm.bidirectional import BidirectionalBounds, bidirectional_bounds
from dglm.gaussian import DiagonalGaussian
from dglm.inpainting import KernelSteps, inpaint
from dglm.likelihoods import Bernoulli, Gaussian, Likelihood
from dglm.model import GenerativeModel
from dglm.module import DGLM
from dglm.networks import Decoder, Encoder

__all__ = [
    "DGLM",
    "AISResult",
    "Bernoulli",
    "BidirectionalBounds",
    "Decoder",
    "DiagonalGaussian",
    "Encoder",
    "Gaussian",
    "GenerativeModel",
    "KernelSteps",
    "Likelihood",
    "bidirectional_bounds",
    "estimate_log_likelihood",
    "inpaint",
]
