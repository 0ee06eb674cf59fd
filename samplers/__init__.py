"""Markov chain Monte Carlo on any differentiable energy: HMC and the learned L2HMC."""

from samplers.adaptation import (
    Adapted,
    DualAveraging,
    Mass,
    Moments,
    adapt,
    settle,
    track_acceptance,
)
from samplers.chains import Chains, Snapshot, sample, sample_chunks
from samplers.comparison import Comparison, compare
from samplers.diagnostics import (
    RELEASE_CUTOFF,
    ESSPerStep,
    Summary,
    autocorrelation,
    ess_per_step,
    summarise,
)
from samplers.distributions import DistributionEnergy
from samplers.energy import Energy, EnergyWithGradient, State, fresh_leaf, value_and_gradient
from samplers.flows import Flow
from samplers.hmc import HMC
from samplers.independence import Independence
from samplers.kernel import Endpoint, Info, Kernel, Noise, PhasePoint
from samplers.l2hmc import L2HMC
from samplers.learning import Learned, learn
from samplers.objective import reciprocal_jump_loss, squared_jump
from samplers.preconditioned import Preconditioned
from samplers.random import mixed_seed, seeded_generator
from samplers.targets import (
    TARGETS,
    Banana,
    Funnel,
    GaussianMixture,
    GaussianTarget,
    RoughWell,
    Target,
    ill_conditioned_gaussian,
    strongly_correlated_gaussian,
)
from samplers.tempering import parallel_tempering
from samplers.training import TrainingHistory, TrainingSettings, train_sampler
from samplers.turns import Turns

__all__ = [
    "HMC",
    "L2HMC",
    "RELEASE_CUTOFF",
    "TARGETS",
    "Adapted",
    "Banana",
    "Chains",
    "Comparison",
    "DistributionEnergy",
    "DualAveraging",
    "ESSPerStep",
    "Endpoint",
    "Energy",
    "EnergyWithGradient",
    "Flow",
    "Funnel",
    "GaussianMixture",
    "GaussianTarget",
    "Independence",
    "Info",
    "Kernel",
    "Learned",
    "Mass",
    "Moments",
    "Noise",
    "PhasePoint",
    "Preconditioned",
    "RoughWell",
    "Snapshot",
    "State",
    "Summary",
    "Target",
    "TrainingHistory",
    "TrainingSettings",
    "Turns",
    "adapt",
    "autocorrelation",
    "compare",
    "ess_per_step",
    "fresh_leaf",
    "ill_conditioned_gaussian",
    "learn",
    "mixed_seed",
    "parallel_tempering",
    "reciprocal_jump_loss",
    "sample",
    "sample_chunks",
    "seeded_generator",
    "settle",
    "squared_jump",
    "strongly_correlated_gaussian",
    "summarise",
    "track_acceptance",
    "train_sampler",
    "value_and_gradient",
]
