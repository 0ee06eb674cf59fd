"""Markov chain Monte Carlo on any differentiable energy: HMC and the learned L2HMC."""

from samplers.adaptation import adapt
from samplers.chains import Chains, sample, sample_chunks
from samplers.comparison import compare
from samplers.diagnostics import summarise
from samplers.distributions import DistributionEnergy
from samplers.energy import Energy, EnergyWithGradient, State, value_and_gradient
from samplers.flows import Flow, Independence
from samplers.hmc import HMC
from samplers.kernel import Endpoint, Info, Kernel, Noise, PhasePoint
from samplers.l2hmc import L2HMC
from samplers.learned import Learned
from samplers.learning import learn
from samplers.objective import reciprocal_jump_loss
from samplers.preconditioned import Preconditioned
from samplers.random import seeded_generator
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
from samplers.training import TrainingSettings, train_sampler
from samplers.turns import Turns

__all__ = [
    "HMC",
    "L2HMC",
    "TARGETS",
    "Banana",
    "Chains",
    "DistributionEnergy",
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
    "Noise",
    "PhasePoint",
    "Preconditioned",
    "RoughWell",
    "State",
    "Target",
    "TrainingSettings",
    "Turns",
    "adapt",
    "compare",
    "ill_conditioned_gaussian",
    "learn",
    "parallel_tempering",
    "reciprocal_jump_loss",
    "sample",
    "sample_chunks",
    "seeded_generator",
    "strongly_correlated_gaussian",
    "summarise",
    "train_sampler",
    "value_and_gradient",
]
