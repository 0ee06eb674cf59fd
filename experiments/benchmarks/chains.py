"""W1: many chains on a small target, beside blackjax."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks import peer
from experiments.benchmarks.timing import Workload, agree
from samplers import HMC, Energy, Kernel, State, ill_conditioned_gaussian, seeded_generator

_CHAINS, _LEAPFROGS, _STEPS, _STEPS_A_CALL, _STEP_SIZE = 200, 10, 400, 5, 0.12


def small_target() -> Workload:
    """Return W1: the 50-dimensional ill-conditioned Gaussian, noise drawn by each contender."""
    variances = ill_conditioned_gaussian().covariance.diagonal().float()
    generator = seeded_generator("cpu", 0)
    start = torch.randn(_CHAINS, len(variances), generator=generator) * variances.sqrt()
    precision = 1 / variances

    def energy(x: Tensor) -> Tensor:
        return 0.5 * (x.square() * precision).sum(dim=-1)

    kernels = {name: HMC(_LEAPFROGS, _STEP_SIZE) for name in ("compiled", "eager")}
    kernels["compiled"].compile()
    contenders: dict[str, Callable[[], Any]] = {
        name: (lambda kernel=kernel: _run(kernel, energy, start))  # type: ignore[misc]
        for name, kernel in kernels.items()
    }
    checks = agree(
        "position", contenders["compiled"]().position, contenders["eager"]().position, 1e-3
    )
    reference = "eager"
    if peer.INSTALLED:
        theirs = _blackjax(precision, start)
        contenders["blackjax"], reference = theirs, "blackjax"
        checks |= agree("energy", theirs.energy(), energy(start), 1e-5)
    title = f"{_STEPS} HMC steps of {_LEAPFROGS} leapfrogs, {_CHAINS} chains, 50-d Gaussian"
    return Workload(title, reference, contenders, 7, checks)


@torch.no_grad()
def _run(kernel: Kernel, energy: Energy, start: Tensor) -> State:
    generator = seeded_generator("cpu", 1)
    state = kernel.init(start, energy)
    for _ in range(_STEPS // _STEPS_A_CALL):
        noises = [kernel.noise(state, generator) for _ in range(_STEPS_A_CALL)]
        state, _ = kernel(state, energy, noises)
    return state


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
