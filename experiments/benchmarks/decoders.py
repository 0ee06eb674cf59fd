"""W2, W3 and W4: posteriors of decoders, beside the matrix products alone."""

from collections.abc import Callable
from dataclasses import replace

import torch

from experiments.benchmarks.cases import Annealing, Posterior, SamplerUpdate, Sizes
from experiments.benchmarks.published import PublishedL2HMC
from experiments.benchmarks.timing import Workload, agree
from samplers import HMC, Kernel, State, seeded_generator

_STEP_SIZE = 0.05
PRODUCTS = "matrix products alone"


def posterior(sizes: Sizes) -> Workload:
    """Return W2: HMC on p(z|x), five steps of five leapfrogs."""
    case, steps, leapfrogs = Posterior(sizes), 5, 5
    compiled, eager = HMC(leapfrogs, _STEP_SIZE), HMC(leapfrogs, _STEP_SIZE)
    compiled.compile()
    energy = case.model.energy(case.x)

    @torch.no_grad()
    def run(kernel: Kernel) -> State:
        generator, state = seeded_generator("cpu", 0), kernel.init(case.z, energy)
        for _ in range(steps):
            state, _ = kernel(state, energy, [kernel.noise(state, generator)])
        return state

    checks = agree("energy", run(compiled).energy, run(eager).energy, 1e-3)
    contenders: dict[str, Callable[[], object]] = {
        PRODUCTS: case.products(steps * leapfrogs + 1),
        "compiled": lambda: run(compiled),
        "eager": lambda: run(eager),
    }
    title = f"HMC {steps} × {leapfrogs} on p(z|x), {sizes}"
    return Workload(title, PRODUCTS, contenders, 9, checks)


def annealing(sizes: Sizes) -> Workload:
    """Return W3: annealed importance sampling, eight transitions of ten leapfrogs."""
    sizes = replace(sizes, mh_steps=8, leapfrogs=10)
    compiled, eager = Annealing(sizes, compile=True), Annealing(sizes)
    checks = agree("log weight", compiled(), eager(), 1e-3)
    contenders: dict[str, Callable[[], object]] = {
        PRODUCTS: compiled.case.products(sizes.gradients),
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
        # A Hessian-vector product is as many matrix products as a gradient.
        PRODUCTS: compiled.case.products(2 * sizes.gradients),
        "compiled": compiled,
        "eager": eager,
    }
    title = f"L2HMC-DGLM sampler update {sizes.mh_steps} × {sizes.leapfrogs}, {sizes}"
    return Workload(title, "as published", contenders, 5, checks)


SIZES = (Sizes(), replace(Sizes(), hidden=(200, 200)))
"""Of W2 and W3: the paper's, and a decoder whose products are too small to fill a processor."""
