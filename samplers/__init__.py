"""Markov chain Monte Carlo on any differentiable energy: HMC and the learned L2HMC."""

from samplers.adaptation import track_acceptance
from samplers.chains import Chains, sample
from samplers.energy import Energy, EnergyWithGradient, State, evaluate
from samplers.exactness import RoundTrip, round_trip
from samplers.hmc import HMC
from samplers.kernel import Info, Kernel, Noise
from samplers.l2hmc import L2HMC
from samplers.objective import reciprocal_jump_loss, squared_jump
from samplers.random import mixed_seed, seeded_generator

__all__ = [
    "HMC",
    "L2HMC",
    "Chains",
    "Energy",
    "EnergyWithGradient",
    "Info",
    "Kernel",
    "Noise",
    "RoundTrip",
    "State",
    "evaluate",
    "mixed_seed",
    "reciprocal_jump_loss",
    "round_trip",
    "sample",
    "seeded_generator",
    "squared_jump",
    "track_acceptance",
]
