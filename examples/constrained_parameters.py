"""Parameters that must be positive: precisions of measurements, sampled through their logarithms.

    python examples/constrained_parameters.py

Each of three instruments is off by y ~ N(0, 1/τ) in ten readings. With a Gamma(a, b) prior its
precision τ has the posterior Gamma(a + 10/2, b + Σ y²/2): the answer is known. Chains need all of
R^D, so they run in u = T⁻¹(τ), with T = biject_to(positive) = exp, and the density of u has a
factor |∂T/∂u| more than that of τ:

    U(u) = -log p(y | T(u)) - log p(T(u)) - log |∂T/∂u|.

Where the posterior itself is a torch Distribution, ``DistributionEnergy`` does all of this.
"""

from typing import NamedTuple

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.distributions import Gamma, Normal, biject_to, constraints

from samplers import HMC, adapt, sample, seeded_generator, summarise

# Not validated: a trajectory that diverges is to be rejected and counted, not an error.
PRIOR = Gamma(2.0, 1.0, validate_args=False)
TO_POSITIVE = biject_to(constraints.positive)


class Found(NamedTuple):
    """The posterior of each instrument's precision, (instrument,) each."""

    exact: Gamma
    mean: Tensor
    mean_error: Tensor
    """Standard error, from the effective sample size."""
    variance: Tensor
    variance_error: Tensor


def main(num_chains: int = 100, num_steps: int = 1000, seed: int = 0) -> Found:
    """Sample the precisions and print their moments beside the exact ones.

    Args:
        num_chains: Chains, from around u = 0.
        num_steps: Draws of each chain, after a warm-up of 300 steps.
        seed: Of all randomness.
    """
    generator = seeded_generator("cpu", seed, 0)
    readings = torch.randn(10, 3, generator=generator) * torch.tensor([0.5, 1.0, 2.0])
    exact = Gamma(2.0 + 10 / 2, 1.0 + readings.square().sum(dim=0) / 2)

    def energy(u: Tensor) -> Tensor:
        precision = TO_POSITIVE(u)
        noise = Normal(0.0, precision[:, None].rsqrt(), validate_args=False)
        off = noise.log_prob(readings).sum(dim=1)
        log_determinant = TO_POSITIVE.log_abs_det_jacobian(u, precision)
        return -(off + PRIOR.log_prob(precision) + log_determinant).sum(dim=1)

    start = 0.1 * torch.randn(num_chains, 3, generator=generator)
    warm = adapt(HMC(3), energy, start, 300, mass="diagonal", generator=generator)
    chains = sample(warm.kernel, energy, warm.position, num_steps, generator=generator)
    precisions = TO_POSITIVE(chains.draws).double()
    squares = (precisions - exact.mean).square()
    mean, variance = (values.mean(dim=(0, 1)) for values in (precisions, squares))
    errors = (summarise(values).mcse for values in (precisions, squares))
    found = Found(exact, mean, next(errors), variance, next(errors))
    for name in ("mean", "variance"):
        value, error = getattr(found, name), getattr(found, f"{name}_error")
        for index, true in enumerate(getattr(exact, name).tolist()):
            estimate = f"{value[index]:.4f} ± {error[index]:.4f}"
            print(f"τ{index + 1} {name:8}  {estimate}   exact {true:.4f}")
    return found


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
