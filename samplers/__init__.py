"""Markov chain Monte Carlo on any differentiable energy: HMC and the learned L2HMC."""

from samplers.adaptation import Adapted, DualAveraging, Mass, adapt, track_acceptance
from samplers.chains import Chains, sample
from samplers.energy import Energy, EnergyWithGradient, State, evaluate, leaf
from samplers.hmc import HMC
from samplers.kernel import Info, Kernel, Noise
from samplers.l2hmc import L2HMC
from samplers.moments import Moments
from samplers.objective import reciprocal_jump_loss, squared_jump
from samplers.preconditioned import Preconditioned
from samplers.random import mixed_seed, seeded_generator
from samplers.training import TrainingHistory, TrainingSettings, train_sampler

__all__ = [
    "HMC",
    "L2HMC",
    "Adapted",
    "Chains",
    "DualAveraging",
    "Energy",
    "EnergyWithGradient",
    "Info",
    "Kernel",
    "Mass",
    "Moments",
    "Noise",
    "Preconditioned",
    "State",
    "TrainingHistory",
    "TrainingSettings",
    "adapt",
    "evaluate",
    "leaf",
    "mixed_seed",
    "reciprocal_jump_loss",
    "sample",
    "seeded_generator",
    "squared_jump",
    "track_acceptance",
    "train_sampler",
]
