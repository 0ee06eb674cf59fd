"""Markov chain Monte Carlo on any differentiable energy: HMC and the learned L2HMC."""

from samplers.adaptation import track_acceptance
from samplers.chains import Chains, Snapshot, sample, sample_chunks
from samplers.densities import Gaussian, GaussianMixture, Target
from samplers.diagnostics import (
    RELEASE_CUTOFF,
    ESSPerStep,
    Summary,
    autocorrelation,
    ess_per_step,
    summarise,
)
from samplers.energy import Energy, EnergyWithGradient, State, evaluate
from samplers.hmc import HMC
from samplers.kernel import Info, Kernel, Noise
from samplers.l2hmc import L2HMC
from samplers.objective import reciprocal_jump_loss, squared_jump
from samplers.random import mixed_seed, seeded_generator
from samplers.targets import (
    TARGETS,
    Banana,
    Funnel,
    RoughWell,
    ill_conditioned_gaussian,
    strongly_correlated_gaussian,
)

__all__ = [
    "HMC",
    "L2HMC",
    "RELEASE_CUTOFF",
    "TARGETS",
    "Banana",
    "Chains",
    "ESSPerStep",
    "Energy",
    "EnergyWithGradient",
    "Funnel",
    "Gaussian",
    "GaussianMixture",
    "Info",
    "Kernel",
    "Noise",
    "RoughWell",
    "Snapshot",
    "State",
    "Summary",
    "Target",
    "autocorrelation",
    "ess_per_step",
    "evaluate",
    "ill_conditioned_gaussian",
    "mixed_seed",
    "reciprocal_jump_loss",
    "sample",
    "sample_chunks",
    "seeded_generator",
    "squared_jump",
    "strongly_correlated_gaussian",
    "summarise",
    "track_acceptance",
]
