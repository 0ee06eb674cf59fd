"""A learned kernel that crosses between modes visits each as often as its weight says."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from samplers import (
    L2HMC,
    GaussianMixture,
    Kernel,
    TrainingSettings,
    sample,
    seeded_generator,
    train_sampler,
)

CENTRES = [[-1.25, 0.0], [1.25, 0.0]]  # eight standard deviations apart
VARIANCES = [0.1, 0.1]
COUNT, STEPS = 2000, 50

Kernels = tuple[L2HMC, L2HMC]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """The same kernel before and after a training on equal weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = L2HMC(2, num_leapfrogs=5, step_size=0.1, hidden=10).double()
    after = deepcopy(before)
    settings = TrainingSettings(
        400,
        100,
        objective="reciprocal",
        jump_scale=0.1,
        initial_weight=1.0,
        initial_temperature=10.0,
        annealing_iterations=250,
        learning_rate=0.01,
    )

    def initial(count: int, generator: torch.Generator) -> Tensor:
        return 1.5 * torch.randn(count, 2, generator=generator)

    train_sampler(after, GaussianMixture(CENTRES, VARIANCES), initial, settings)
    torch.set_num_threads(threads)
    return before, after


def share_of_the_right_mode(kernel: Kernel, target: GaussianMixture, mode: int) -> Tensor:
    """Return it after some steps of each of independent chains that start in one mode, (B,)."""
    start = target.centres[mode].expand(COUNT, 2)
    chains = sample(kernel, target, start, 1, thin=STEPS, generator=seeded_generator("cpu", 1))
    return target.responsibilities(chains.draws[:, 0])[:, 1]


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("weight", [0.5, 0.7])
def test_chains_from_one_mode_end_with_the_weights(
    kernels: Kernels, weight: float, mode: int
) -> None:
    target = GaussianMixture(CENTRES, VARIANCES, [1 - weight, weight])
    before, after = (share_of_the_right_mode(kernel, target, mode) for kernel in kernels)
    # What crosses was learned: the kernel as it began stays where it started.
    assert (before - mode).abs().mean() < 0.05
    # One draw of each independent chain, so that their number is the effective sample size.
    error = after.std() / COUNT**0.5
    assert 0.9 < error / (weight * (1 - weight) / COUNT) ** 0.5 < 1.1
    assert (after.mean() - weight).abs() < 5 * error
