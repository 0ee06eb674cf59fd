"""What these tests share: double precision, a small binary model, and one with known evidence."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from dglm import DGLM, Decoder, Encoder, Gaussian, GenerativeModel
from dglm.coordinates import AmortizedPreconditioned, GaussianNetwork
from dglm.model import NegativeLogLikelihood
from samplers import HMC, L2HMC, Kernel, State

PIXELS, LATENT = 6, 3


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(default)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: with so little work, most of the time goes into waiting for others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        return AmortizedPreconditioned(inside, network)
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
