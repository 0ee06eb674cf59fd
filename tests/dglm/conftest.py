"""What these tests share: double precision, small models, exact answers, trainers and batches."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from dglm import DGLM, Decoder, Encoder, Gaussian, GenerativeModel
from dglm.coordinates import AmortizedPreconditioned, GaussianNetwork
from dglm.model import NegativeLogLikelihood
from samplers import HMC, L2HMC, Kernel, State, seeded_generator

PIXELS, LATENT = 6, 3


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(default)


def spread(module: nn.Module, std: float = 0.7) -> nn.Module:
    """Draw all parameters anew, far enough from zero that every term of a gradient matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


@pytest.fixture
def model() -> GenerativeModel:
    """Six pixels, three latent variables, and a posterior that is far from the prior."""
    return spread(GenerativeModel(Decoder(LATENT, PIXELS, (5,)), LATENT))  # type: ignore[return-value]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(7, PIXELS).round()


def build_kernel(kind: str, step_size: float) -> Kernel | None:
    if kind == "vae":
        return None
    if kind.endswith(" in coordinates"):
        inside = build_kernel(kind.removesuffix(" in coordinates"), step_size)
        assert inside is not None
        network = spread(GaussianNetwork(PIXELS, LATENT, (4,)), std=0.3)
        return AmortizedPreconditioned(inside, network, Encoder(PIXELS, LATENT, (4,)))
    if kind == "hmc":
        return HMC(2, step_size)
    options = {"hidden": 4, "observation_dim": PIXELS, "embedding_hidden": (3,)}
    kernel = spread(L2HMC(LATENT, 2, step_size, **options), std=0.4)  # type: ignore[arg-type]
    with torch.no_grad():
        kernel.log_step_size.fill_(step_size).log_()
    return kernel  # type: ignore[return-value]


@pytest.fixture
def build_dglm() -> Callable[..., DGLM]:
    """A builder of modules: "vae", "hmc", "l2hmc", and both kernels "in coordinates"."""

    def build(kind: str, step_size: float = 0.4, **options: float) -> DGLM:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = spread(GenerativeModel(Decoder(LATENT, PIXELS, (5,)), LATENT))
            encoder = spread(Encoder(PIXELS, LATENT, (4,)), std=0.3)
            kernel = build_kernel(kind, step_size)
        settings = {"num_mh_steps": 3, **options}
        return DGLM(model, encoder, kernel, **settings)  # type: ignore[arg-type]

    return build


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows at which the likelihood's gradient has been evaluated."""
    rows, value_and_gradient = [], NegativeLogLikelihood.value_and_gradient

    def counting(self: NegativeLogLikelihood, position: Tensor) -> State:
        rows.append(len(position))
        return value_and_gradient(self, position)

    monkeypatch.setattr(NegativeLogLikelihood, "value_and_gradient", counting)
    return rows


@pytest.fixture
def linear_gaussian() -> Callable[..., GenerativeModel]:
    """A builder of models x = W z + b + noise, of which everything is known in closed form."""

    def build(latent_dim: int = 2, pixels: int = 4, noise: float = 0.5) -> GenerativeModel:
        decoder = spread(nn.Linear(latent_dim, pixels))
        return GenerativeModel(decoder, latent_dim, Gaussian(noise))

    return build


@pytest.fixture
def exact_log_likelihood() -> Callable[[GenerativeModel, Tensor], Tensor]:
    """log N(x; b, W Wᵀ + s²) of a linear-Gaussian model."""

    def log_likelihood(model: GenerativeModel, x: Tensor) -> Tensor:
        weight, bias = model.decoder.weight.detach(), model.decoder.bias.detach()
        variance = model.likelihood.scale**2  # type: ignore[operator]
        covariance = weight @ weight.mT + variance * torch.eye(len(weight)).to(weight)
        return MultivariateNormal(bias, covariance).log_prob(x)

    return log_likelihood


class Beside(nn.Module):
    """An encoder beside the exact posterior, in its standard deviations, and of another width."""

    def __init__(
        self, posterior: Callable[[Tensor], MultivariateNormal], shift: float, factor: float
    ) -> None:
        super().__init__()
        self.posterior, self.shift, self.factor = posterior, shift, factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        exact = self.posterior(x)
        deviation = exact.variance.sqrt().expand_as(exact.mean)
        return exact.mean + self.shift * deviation, (self.factor * deviation).log()


@pytest.fixture
def encoder_beside(
    exact_posterior: Callable[[GenerativeModel, Tensor], MultivariateNormal],
) -> Callable[[GenerativeModel, float, float], nn.Module]:
    """A builder of such encoders for linear-Gaussian models."""
    return lambda model, shift, factor: Beside(lambda x: exact_posterior(model, x), shift, factor)


@pytest.fixture
def exact_posterior() -> Callable[[GenerativeModel, Tensor], MultivariateNormal]:
    """p(z|x) of a linear-Gaussian model."""

    def posterior(model: GenerativeModel, x: Tensor) -> MultivariateNormal:
        weight, bias = model.decoder.weight.detach(), model.decoder.bias.detach()
        variance = model.likelihood.scale**2  # type: ignore[operator]
        precision = torch.eye(model.latent_dim) + weight.mT @ weight / variance
        mean = torch.linalg.solve(precision, ((x - bias) @ weight / variance).mT).mT
        return MultivariateNormal(mean, precision_matrix=precision)

    return posterior


@pytest.fixture
def on_a_grid() -> Callable[[GenerativeModel, Tensor], Tensor]:
    """log p(x) of models of one or two latent variables, by a sum over a grid."""

    @torch.no_grad()
    def log_likelihood(model: GenerativeModel, x: Tensor) -> Tensor:
        line = torch.linspace(-8, 8, 4001 if model.latent_dim == 1 else 101)
        z = torch.cartesian_prod(*[line] * model.latent_dim).view(-1, model.latent_dim)
        sums = [model.log_joint(each.expand(len(z), -1), z).logsumexp(dim=0) for each in x]
        return torch.stack(sums) + model.latent_dim * math.log(16 / (len(line) - 1))

    return log_likelihood


@pytest.fixture(scope="session")
def make_trainer() -> Callable[..., Trainer]:
    """A builder of silent trainers on the CPU."""

    def make(**arguments: Any) -> Trainer:
        quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        settings = {**dict.fromkeys(quiet, False), "accelerator": "cpu", "num_sanity_val_steps": 0}
        return Trainer(**{**settings, **arguments})

    return make


class Batches:
    """A data loader of batches of eight binary images."""

    def __init__(self, count: int) -> None:
        generator = seeded_generator("cpu", 17)
        self.images = torch.rand(count, 8, PIXELS, generator=generator).round()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.images.unbind())

    def __len__(self) -> int:
        return len(self.images)


@pytest.fixture(scope="session")
def batches() -> Callable[[int], Batches]:
    """A builder of data loaders, which always give the same images."""
    return Batches


@pytest.fixture(scope="session")
def fit(make_trainer: Callable[..., Trainer], batches: Callable[[int], Batches]) -> Callable:
    """A function that trains for so many updates, in one epoch or in more."""

    def fit(
        module: DGLM,
        steps: int = 3,
        *callbacks: Callback,
        epoch: int | None = None,
        checkpoint: Path | None = None,
        **options: Any,
    ) -> Trainer:
        trainer = make_trainer(**{"max_steps": steps, "callbacks": [*callbacks], **options})
        loaders = batches(epoch or steps), batches(1)
        trainer.fit(module, *loaders, ckpt_path=checkpoint, weights_only=True)
        return trainer

    return fit
