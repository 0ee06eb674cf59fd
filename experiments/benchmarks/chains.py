"""W1: many chains on a small target, beside blackjax."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks import peer
from experiments.benchmarks.timing import Workload, agree
from samplers import HMC, ill_conditioned_gaussian, sample, seeded_generator

_CHAINS, _LEAPFROGS, _STEPS, _STEPS_PER_CALL, _STEP_SIZE = 200, 10, 400, 10, 0.12

_COMPARED_STEPS = 40
# In all, rounding may turn one of the 80,000 decisions, and the chain is another one from there.


def small_target() -> Workload:
    """Return W1: the 50-dimensional ill-conditioned Gaussian, noise drawn by each contender."""
    variances = ill_conditioned_gaussian().covariance.diagonal().float()
    generator = seeded_generator("cpu", 0)
    start = torch.randn(_CHAINS, len(variances), generator=generator) * variances.sqrt()
    precision = 1 / variances

    def energy(x: Tensor) -> Tensor:
        return 0.5 * (x.square() * precision).sum(dim=-1)

    kernels = {name: HMC(_LEAPFROGS, _STEP_SIZE) for name in ("compiled", "eager")}
    kernels["compiled"].compile(_STEPS_PER_CALL)
    kernels["eager"].steps_per_call = _STEPS_PER_CALL  # for the same noise
    few, all_steps = (
        {
            name: partial(sample, kernel, energy, start, 1, thin=steps)
            for name, kernel in kernels.items()
        }
        for steps in (_COMPARED_STEPS, _STEPS)
    )
    checks = agree("position", few["compiled"]().draws, few["eager"]().draws, 1e-3)
    contenders: dict[str, Callable[[], Any]] = dict(all_steps)
    reference = "eager"
    if peer.INSTALLED:
        theirs = _blackjax(precision, start)
        contenders["blackjax"], reference = theirs, "blackjax"
        checks |= agree("energy", theirs.energy(), energy(start), 1e-5)
    title = f"{_STEPS} HMC steps of {_LEAPFROGS} leapfrogs, {_CHAINS} chains, 50-d Gaussian"
    return Workload(title, reference, contenders, 7, checks)


def _blackjax(precision: Tensor, start: Tensor) -> peer.BlackjaxHMC:
    import jax

    weights = jax.numpy.asarray(precision.numpy())
    return peer.BlackjaxHMC(
        lambda x, nothing: -0.5 * (x * x) @ weights,
        start,
        start.new_zeros(len(start)),
        _STEP_SIZE,
        _LEAPFROGS,
        _STEPS,
    )
