import math
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from dglm import DGLM, Encoder, GenerativeModel, inpaint
from dglm.coordinates import AmortizedPreconditioned, GaussianNetwork, score_loss, sibling_loss
from dglm.gaussian import DenseGaussian
from samplers import HMC, L2HMC, Info, Kernel, Preconditioned, seeded_generator

PIXELS, LATENT = 6, 3


def l2hmc() -> L2HMC:
    kernel = L2HMC(LATENT, 2, 0.3, 8, 4.0, observation_dim=PIXELS, embedding_hidden=(4,))
    with torch.no_grad():
        for network in (kernel.position_network, kernel.momentum_network):
            network.heads.bias.normal_(std=0.1)
    return kernel


INSIDE: dict[str, Callable[[], Kernel]] = {"hmc": lambda: HMC(3, 0.6), "l2hmc": l2hmc}


@pytest.fixture(params=INSIDE)
def kernel(request: pytest.FixtureRequest) -> AmortizedPreconditioned:
    """A kernel whose coordinates are other ones for each image, and far from its posterior."""
    network = GaussianNetwork(PIXELS, LATENT, (5,))
    with torch.no_grad():
        network.output.weight.normal_(std=0.3)
        network.output.bias.normal_(std=0.2)
    return AmortizedPreconditioned(INSIDE[request.param](), network, Encoder(PIXELS, LATENT, (5,)))


def test_gaussians_begin_at_the_prior_and_have_lower_triangular_factors(images: Tensor) -> None:
    network = GaussianNetwork(PIXELS, LATENT)
    mean, factor = network(images)
    torch.testing.assert_close(mean, torch.zeros(7, 3), atol=0.05, rtol=0)
    torch.testing.assert_close(factor, torch.eye(3).expand(7, 3, 3), atol=0.05, rtol=0)
    with torch.no_grad():
        network.output.weight.mul_(500)
    factor = network(images).factor
    assert torch.equal(factor, factor.tril())
    assert (factor.diagonal(dim1=1, dim2=2) > 0).all()
    assert (factor[:, *torch.tril_indices(3, 3)].std(dim=0) > 1e-6).all()


def test_gaussians_are_in_units_of_the_models_own_q(
    kernel: AmortizedPreconditioned, model: GenerativeModel, images: Tensor
) -> None:
    encoder = Encoder(PIXELS, LATENT, (4,))
    module = DGLM(model, encoder, kernel, num_mh_steps=1)
    assert kernel.encoder is encoder
    again = deepcopy(module)
    assert again.kernel.encoder is again.encoder  # type: ignore[union-attr]
    mean, factor = kernel(images)
    own_mean, log_std = encoder(images)
    shift, own_factor = kernel.network(images)
    torch.testing.assert_close(factor, torch.diag_embed(log_std.exp()) @ own_factor)
    torch.testing.assert_close(mean, own_mean + (factor @ shift[:, :, None])[:, :, 0])
    (mean.sum() + factor.sum()).backward()
    assert all(each.grad is None for each in encoder.parameters())


@torch.no_grad()
def test_each_image_has_the_preconditioned_kernel_of_its_own_coordinates(
    kernel: AmortizedPreconditioned, model: GenerativeModel, images: Tensor
) -> None:
    energy, context = model.energy(images), kernel.embed(images)
    state = kernel.init(torch.randn(7, 3), energy)
    noise = kernel.noise(state, seeded_generator("cpu", 1))
    found, info = kernel.step(state, energy, noise, context)
    assert 0 < info.accepted.sum() < 7
    for row in range(7):
        only = slice(row, row + 1)
        own = Preconditioned(kernel.kernel, *(part[row] for part in context.gaussian))
        own_energy, inside = model.energy(images[only]), kernel.kernel.embed(images[only])
        start = own.init(state.position[only], own_energy)
        own_noise = type(noise)(*(part[only] for part in noise))
        expected, own_info = own.step(start, own_energy, own_noise, inside)
        torch.testing.assert_close([part[only] for part in found[:3]], list(expected[:3]))
        torch.testing.assert_close([part[only] for part in info], list(own_info))


def test_the_score_loss_is_zero_at_a_gaussian_posterior_wherever_the_chain_is(
    linear_gaussian: Callable[..., GenerativeModel],
    exact_posterior: Callable[[GenerativeModel, Tensor], MultivariateNormal],
) -> None:
    model = linear_gaussian(LATENT)
    x, _ = model.sample(7)
    exact = exact_posterior(model, x)
    factor = exact.scale_tril.expand(7, 3, 3)
    state = model.energy(x).value_and_gradient(5 * torch.randn(7, 3))
    found = score_loss(DenseGaussian(exact.mean, factor), state)
    torch.testing.assert_close(found, torch.zeros(7))
    for mean, wrong in ((exact.mean, 1.1 * factor), (exact.mean + 0.1, factor)):
        assert (score_loss(DenseGaussian(mean, wrong), state) > 1e-3).all()


class Watched(nn.Module):
    """Coordinates that keep the images that they were asked for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        self.seen.append(x)
        return self.network(x)


@pytest.mark.parametrize(
    ("draw", "acceptance", "moved"),
    [
        (lambda w: torch.randn_like(w), 1.0, (1.0, 1.0)),
        (lambda w: torch.randn_like(w), 0.5, (0.5, 0.5)),  # 1 - ρ₁ = .5 is below 1 - ρ₂ = .75
        (lambda w: 0.8 * w + 0.6 * torch.randn_like(w), 1.0, (0.2, 1 - 0.8**2)),
        (lambda w: -w, 1.0, (0.0, 0.0)),  # to the mirror image
        (lambda w: w, 1.0, (0.0, 0.0)),
    ],
)
def test_the_sibling_loss_is_one_less_the_autocorrelation_of_w_and_of_its_square(
    draw: Callable[[Tensor], Tensor], acceptance: float, moved: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    count, factor = 20_000, torch.tensor([[[0.5, 0], [1, 2]]])
    gaussian = DenseGaussian(torch.tensor([[2.0, -1.0]]), factor)
    one = torch.randn(count, 2)
    w = torch.cat([one, one])
    each = torch.full((2 * count,), acceptance)
    info = Info(gaussian.colour(draw(w)), each, each > 0, each < 0)
    expected = -0.5 * sum(math.log(share + 1e-3) for share in moved)
    expected -= 5 * math.log(acceptance + 1e-4)
    # Five errors of each logarithm: the relative error of a mean of 2n squares of squares is 2/√n.
    found = sibling_loss(gaussian, gaussian.colour(w), info)
    torch.testing.assert_close(float(found), expected, rtol=0, atol=5 * 2 / math.sqrt(count))


def test_coordinates_are_those_of_the_images_of_each_sweep(
    kernel: AmortizedPreconditioned, model: GenerativeModel, images: Tensor
) -> None:
    kernel.network = watched = Watched(kernel.network)
    frames = inpaint(model, images, torch.arange(6) < 3, 3, (kernel, 2))
    assert torch.equal(torch.stack(watched.seen), torch.stack([images, *frames[:-1]]))


def test_a_compiled_copy_is_the_eager_kernel(
    kernel: AmortizedPreconditioned, model: GenerativeModel, images: Tensor, compiler: Any
) -> None:
    energy, compiled, compiler.backend = model.energy(images), copy(kernel), "aot_eager"
    compiled.compile(backend=compiler)
    state = kernel.init(torch.randn(7, 3), energy)
    noise = kernel.noise(state, seeded_generator("cpu", 1))

    def results(kernel: Kernel) -> list[Tensor]:
        after, info = kernel.step(state, energy, noise, kernel.embed(images))
        loss = info.proposal.square().sum() + info.acceptance.sum()
        parameters = list(kernel.kernel.parameters())  # type: ignore[union-attr]
        return [*after[:3], *info, *(torch.autograd.grad(loss, parameters) if parameters else ())]

    torch.testing.assert_close(results(compiled), results(kernel), rtol=1e-9, atol=1e-9)


def test_a_step_without_a_context_says_what_it_needs(
    kernel: AmortizedPreconditioned, model: GenerativeModel, images: Tensor
) -> None:
    energy = model.energy(images)
    state = kernel.init(torch.zeros(7, 3), energy)
    with pytest.raises(ValueError, match=r"pass context=kernel\.embed\(x\)"):
        kernel.step(state, energy, kernel.noise(state))
