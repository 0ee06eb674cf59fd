"""W2, W3 and W4: posteriors of decoders, beside the matrix products alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from dglm import Decoder, GenerativeModel
from dglm.ais import annealed_path, transition
from dglm.annealing import anneal, temperatures
from dglm.chain import run_chain
from dglm.gaussian import DiagonalGaussian
from experiments.benchmarks.timing import Workload, agree
from samplers import HMC, L2HMC, Kernel, State, seeded_generator

_LATENT, _PIXELS, _ROWS, _STEP_SIZE = 50, 784, 512, 0.05
PRODUCTS = "matrix products alone"


class _Case:
    """A decoder with random weights, images and latent variables."""

    def __init__(self, hidden: list[int]) -> None:
        torch.manual_seed(0)
        self.model = GenerativeModel(Decoder(_LATENT, _PIXELS, hidden), _LATENT)
        self.x = (torch.rand(_ROWS, _PIXELS) < 0.3).float()
        self.z = torch.randn(_ROWS, _LATENT)

    def products(self, gradients: int) -> Callable[[], None]:
        """Return the matrix products of so many gradients of log p(x|z), into kept memory."""
        weights = [p.detach() for p in self.model.decoder.parameters() if p.dim() == 2]
        up = [torch.empty(_ROWS, len(weight)) for weight in weights]
        down = [torch.empty(_ROWS, weight.shape[1]) for weight in weights]

        @torch.no_grad()
        def work() -> None:
            for _ in range(gradients):
                hidden = self.z
                for weight, room in zip(weights, up, strict=True):
                    hidden = torch.mm(hidden, weight.T, out=room)
                for weight, room in zip(weights[::-1], down[::-1], strict=True):
                    hidden = torch.mm(hidden, weight, out=room)

        return work


def posterior(hidden: list[int]) -> Workload:
    """Return W2: HMC on p(z|x), five steps of five leapfrogs."""
    case, steps, leapfrogs = _Case(hidden), 5, 5
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
    title = f"HMC {steps} × {leapfrogs} on p(z|x), decoder {_shape(hidden)}, {_ROWS} rows"
    return Workload(title, PRODUCTS, contenders, 9, checks)


def annealing(hidden: list[int]) -> Workload:
    """Return W3: annealed importance sampling, eight transitions of ten leapfrogs."""
    case, changes, leapfrogs = _Case(hidden), 9, 10
    betas, step_sizes = temperatures(changes), torch.full((changes - 1,), 0.1).double()
    kernels = [transition(leapfrogs, case.x.device, compile) for compile in (True, False)]

    @torch.no_grad()
    def run(kernel: HMC) -> Tensor:
        path = annealed_path(case.model, case.x, "prior")
        generator = seeded_generator("cpu", 0)
        return anneal(path, case.z, betas, kernel, step_sizes, generator).log_weight

    checks = agree("log weight", run(kernels[0]), run(kernels[1]), 1e-3)
    contenders: dict[str, Callable[[], object]] = {
        PRODUCTS: case.products((changes - 1) * leapfrogs + 1),
        "compiled": lambda: run(kernels[0]),
        "eager": lambda: run(kernels[1]),
    }
    title = f"AIS, {changes - 1} × {leapfrogs} leapfrogs, decoder {_shape(hidden)}, {_ROWS} rows"
    return Workload(title, PRODUCTS, contenders, 7, checks)


def sampler_update() -> Workload:
    """Return W4: loss and gradient of one L2HMC-DGLM sampler update at the paper's sizes."""
    case, steps, leapfrogs = _Case([1024, 1024]), 5, 5
    q = DiagonalGaussian(case.z, torch.full_like(case.z, -1.0))
    compiled, eager = (_paper_sampler(leapfrogs) for _ in range(2))
    compiled.compile()

    def run(kernel: L2HMC) -> Tensor:
        kernel.zero_grad()
        generator = seeded_generator("cpu", 0)
        loss = run_chain(case.model, kernel, case.x, q, case.z, steps, generator).loss.mean()
        loss.backward()
        gradients = [each.grad for each in kernel.parameters() if each.grad is not None]
        return torch.stack([loss.detach(), torch.nn.utils.get_total_norm(gradients)])

    # The reciprocal loss multiplies rounding where a chain hardly moves.
    checks = agree("loss and gradient norm", run(compiled), run(eager), 1e-3)
    contenders: dict[str, Callable[[], object]] = {
        # A Hessian-vector product is as many matrix products as a gradient.
        PRODUCTS: case.products(2 * (steps * leapfrogs + 1)),
        "compiled": lambda: run(compiled),
        "eager": lambda: run(eager),
    }
    return Workload("L2HMC-DGLM sampler update, paper's sizes", PRODUCTS, contenders, 5, checks)


def _paper_sampler(leapfrogs: int) -> L2HMC:
    torch.manual_seed(1)
    return L2HMC(_LATENT, leapfrogs, hidden=200, head_scale=0.01, observation_dim=_PIXELS)


def _shape(hidden: list[int]) -> str:
    return "-".join(map(str, [_LATENT, *hidden, _PIXELS]))
