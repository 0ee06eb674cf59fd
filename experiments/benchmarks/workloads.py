"""W1 to W4: small targets and posteriors of decoders, beside peers and the products alone."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks import peer
from experiments.benchmarks.cases import PRODUCTS, Annealing, Posterior, SamplerUpdate, Sizes
from experiments.benchmarks.published import PublishedL2HMC
from experiments.benchmarks.timing import Workload, agree
from samplers import HMC, Kernel, State, ill_conditioned_gaussian, sample, seeded_generator

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

    def run(kernel: HMC, steps: int = _STEPS) -> Tensor:
        same = seeded_generator("cpu", 0, "w1")
        return sample(kernel, energy, start, 1, thin=steps, generator=same).draws

    compiled, eager = (run(kernels[name], _COMPARED_STEPS) for name in ("compiled", "eager"))
    checks = agree("position", compiled, eager, 1e-3)
    contenders: dict[str, Callable[[], Any]] = {
        name: partial(run, kernel) for name, kernel in kernels.items()
    }
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


_POSTERIOR_STEP_SIZE = 0.05


def posterior(sizes: Sizes) -> Workload:
    """Return W2: HMC on p(z|x), five steps of five leapfrogs."""
    case, steps, leapfrogs = Posterior(sizes), 5, 5
    compiled, eager = HMC(leapfrogs, _POSTERIOR_STEP_SIZE), HMC(leapfrogs, _POSTERIOR_STEP_SIZE)
    compiled.compile()
    energy = case.model.energy(case.x)

    @torch.no_grad()
    def run(kernel: Kernel) -> State:
        generator, state = seeded_generator("cpu", 0), kernel.init(case.z, energy)
        for _ in range(steps):
            state, _ = kernel.step(state, energy, kernel.noise(state, generator))
        return state

    checks = agree("energy", run(compiled).energy, run(eager).energy, 1e-3)
    contenders: dict[str, Callable[[], object]] = {
        **case.products(steps * leapfrogs + 1),
        "compiled": lambda: run(compiled),
        "eager": lambda: run(eager),
    }
    if peer.INSTALLED:
        theirs = _posterior_by_blackjax(case, leapfrogs, steps)
        contenders["blackjax"] = theirs
        checks |= agree("energy of blackjax", theirs.energy(), energy(case.z).detach(), 1e-5)
    title = f"HMC {steps} × {leapfrogs} on p(z|x), {sizes}"
    return Workload(title, PRODUCTS, contenders, 9, checks)


def _posterior_by_blackjax(case: Posterior, leapfrogs: int, steps: int) -> peer.BlackjaxHMC:
    import jax

    layers = [
        (jax.numpy.asarray(layer.weight.detach().numpy()), jax.numpy.asarray(layer.bias.tolist()))
        for layer in case.model.decoder.modules()
        if isinstance(layer, nn.Linear)
    ]

    def log_density(z: Any, image: Any) -> Any:
        hidden = z
        for weight, bias in layers[:-1]:
            hidden = jax.nn.softplus(weight @ hidden + bias)
        weight, bias = layers[-1]
        logits = weight @ hidden + bias
        normal = -0.5 * (z @ z + z.size * math.log(2 * math.pi))
        return image @ logits - jax.nn.softplus(logits).sum() + normal

    return peer.BlackjaxHMC(log_density, case.z, case.x, _POSTERIOR_STEP_SIZE, leapfrogs, steps)


def annealing(sizes: Sizes) -> Workload:
    """Return W3: annealed importance sampling, eight transitions of ten leapfrogs."""
    sizes = replace(sizes, mh_steps=8, leapfrogs=10)
    compiled, eager = Annealing(sizes, compile=True), Annealing(sizes)
    checks = agree("log weight", compiled(), eager(), 1e-3)
    contenders: dict[str, Callable[[], object]] = {
        **compiled.case.products(sizes.gradients),
        "compiled": compiled,
        "eager": eager,
    }
    title = f"AIS, {sizes.mh_steps} × {sizes.leapfrogs} leapfrogs, {sizes}"
    return Workload(title, PRODUCTS, contenders, 7, checks)


def sampler_update(sizes: Sizes) -> Workload:
    """Return W4: loss and gradient of one L2HMC-DGLM sampler update."""
    compiled, eager = SamplerUpdate(sizes, compile=True), SamplerUpdate(sizes)
    published = SamplerUpdate(sizes, kernel_class=PublishedL2HMC)
    # The reciprocal loss multiplies rounding where a chain hardly moves.
    checks = {
        **agree("compiled loss and gradient norm", compiled(), eager(), 1e-3),
        **agree("published loss and gradient norm", published(), eager(), 1e-3),
    }
    contenders: dict[str, Callable[[], object]] = {
        "as published": published,
        **compiled.case.products(sizes.update_passes),
        "compiled": compiled,
        "eager": eager,
    }
    title = f"L2HMC-DGLM sampler update {sizes.mh_steps} × {sizes.leapfrogs}, {sizes}"
    return Workload(title, "as published", contenders, 5, checks)


SIZES = (Sizes(), replace(Sizes(), hidden=(200, 200)))
"""Of W2 and W3: the paper's, and a decoder whose products are too small to fill a processor."""
