"""The posteriors and the sampler updates that the benchmarks time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from dglm import Decoder, DiagonalGaussian, GenerativeModel
from dglm.ais import transition
from dglm.annealing import AnnealedEnergy, anneal, temperatures
from dglm.chain import run_chain
from samplers import L2HMC, seeded_generator
from samplers.compiling import onednn_is_faster, product

_PIXELS = 784
PRODUCTS = "matrix products alone"


@dataclass(frozen=True)
class Sizes:
    """Of a model, of its sampler and of a training batch; by default the paper's."""

    rows: int = 512
    latent_dim: int = 50
    hidden: tuple[int, ...] = (1024, 1024)
    mh_steps: int = 5
    leapfrogs: int = 5
    sampler_hidden: int = 200
    embedding_hidden: tuple[int, ...] = (512, 512)

    @property
    def gradients(self) -> int:
        """Gradients of U of one chain."""
        return self.mh_steps * self.leapfrogs + 1

    @property
    def update_passes(self) -> int:
        """Passes up and down the decoder of one sampler update.

        A Hessian-vector product is as many matrix products as a gradient; each gradient comes with
        one but the chain's first, which does not depend on the sampler.
        """
        return 2 * self.gradients - 1

    @property
    def weights(self) -> int:
        """Weights of the decoder's matrices."""
        layers = [self.latent_dim, *self.hidden, _PIXELS]
        return sum(inputs * outputs for inputs, outputs in pairwise(layers))

    def __str__(self) -> str:
        layers = "-".join(map(str, [self.latent_dim, *self.hidden, _PIXELS]))
        return f"decoder {layers}, {self.rows} rows"


DEFAULT_TRAINING = Sizes(128, 20, (200, 200), 3, 5, 100, (200,))
"""The sizes of ``python -m experiments.mnist``."""


class Posterior:
    """A decoder with random weights, images and latent variables."""

    def __init__(self, sizes: Sizes, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.decoder = Decoder(sizes.latent_dim, _PIXELS, sizes.hidden)
        self.model = GenerativeModel(self.decoder, sizes.latent_dim).to(device)
        self.x = (torch.rand(sizes.rows, _PIXELS) < 0.3).float().to(device)
        self.z = torch.randn(sizes.rows, sizes.latent_dim).to(device)

    def products(self, gradients: int) -> dict[str, Callable[[], None]]:
        """Return the matrix products of so many gradients of log p(x|z), by each library.

        The faster one first. Those of torch.mm go into kept memory.
        """
        weights = [p.detach() for p in self.decoder.parameters() if p.dim() == 2]
        up = [self.z.new_empty(len(self.z), len(weight)) for weight in weights]
        down = [self.z.new_empty(len(self.z), weight.shape[1]) for weight in weights]

        @torch.no_grad()
        def work(multiply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
            for _ in range(gradients):
                hidden = self.z
                for weight, room in zip(weights, up, strict=True):
                    hidden = multiply(hidden, weight.T, room)
                for weight, room in zip(weights[::-1], down[::-1], strict=True):
                    hidden = multiply(hidden, weight, room)

        by_torch = partial(work, lambda a, b, room: torch.mm(a, b, out=room))
        if not onednn_is_faster(self.z.device.type):
            return {PRODUCTS: by_torch}
        by_onednn = partial(work, lambda a, b, room: product(a, b))
        return {PRODUCTS: by_onednn, f"{PRODUCTS}, torch.mm": by_torch}


class SamplerUpdate:
    """Loss and gradient of one update of the sampler of an L2HMC-DGLM.

    Arguments:
        sizes: Of the work.
        compile: Whether the kernel is compiled.
        kernel_class: L2HMC, or a slower way to compute the same.
        device: Where.
    """

    def __init__(
        self,
        sizes: Sizes,
        compile: bool = False,
        kernel_class: type[L2HMC] = L2HMC,
        device: str = "cpu",
    ) -> None:
        self.sizes = sizes
        self.case = Posterior(sizes, device)
        self.q = DiagonalGaussian(self.case.z, torch.full_like(self.case.z, -1.0))
        torch.manual_seed(1)
        self.kernel = kernel_class(
            sizes.latent_dim,
            sizes.leapfrogs,
            hidden=sizes.sampler_hidden,
            head_scale=0.01,
            observation_dim=_PIXELS,
            embedding_hidden=sizes.embedding_hidden,
        ).to(device)
        if compile:
            self.kernel.compile()

    def __call__(self, generator: torch.Generator | None = None) -> Tensor:
        """Do it once; return the loss and the norm of its gradient, (2,).

        Without a generator, with the same noise each time.
        """
        self.kernel.zero_grad()
        if generator is None:
            generator = seeded_generator(self.case.x.device, 0)
        chain = run_chain(
            self.case.model,
            self.kernel,
            self.case.x,
            self.q,
            self.case.z,
            self.sizes.mh_steps,
            generator,
        )
        loss = chain.loss.mean()
        loss.backward()
        gradients = [each.grad for each in self.kernel.parameters() if each.grad is not None]
        return torch.stack([loss.detach(), torch.nn.utils.get_total_norm(gradients)])


class Annealing:
    """Annealed importance sampling from the prior, its step size given: MH steps of leapfrogs.

    Arguments:
        sizes: Of the work; the networks of the sampler do not matter.
        compile: Whether the transition is compiled.
        device: Where.
    """

    def __init__(self, sizes: Sizes, compile: bool = False, device: str = "cpu") -> None:
        self.sizes = sizes
        self.case = Posterior(sizes, device)
        self.betas = temperatures(sizes.mh_steps + 1)
        # Where the chains are: from elsewhere they would be copied, which a CUDA graph cannot.
        self.step_sizes = torch.full((sizes.mh_steps, len(self.case.x)), 0.1, device=device)
        self.kernel = transition(sizes.leapfrogs, self.case.x.device, compile)

    @torch.no_grad()
    def __call__(self, generator: torch.Generator | None = None) -> Tensor:
        """Do it once; return the log weights, (rows,); without a generator, with the same noise."""
        if generator is None:
            generator = seeded_generator(self.case.x.device, 0)
        zeros = torch.zeros_like(self.case.z)
        likelihood = self.case.model.negative_log_likelihood(self.case.x)
        path = AnnealedEnergy(likelihood, DiagonalGaussian(zeros, zeros))
        return anneal(
            path, self.case.z, self.betas, self.kernel, self.step_sizes, generator
        ).log_weight
