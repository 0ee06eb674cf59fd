"""Non-linear models of one and two latent variables, where sums over a grid give the truth."""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from dglm import (
    AISSettings,
    Decoder,
    DiagonalGaussian,
    FittedStart,
    GenerativeModel,
    bidirectional_bounds,
    estimate_log_likelihood,
)
from dglm.starts import Start
from samplers import HMC, L2HMC, Kernel, Noise

pytestmark = pytest.mark.filterwarnings("ignore:the log-likelihoods of")

EDGE = 5.0
PIXELS = 8


class Wide(nn.Module):
    """An encoder whose Gaussian covers the prior's bulk, beside and wider than the posterior."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = len(x), self.latent_dim
        return x.new_full(shape, 0.4), x.new_full(shape, math.log(0.9))


class Grid(NamedTuple):
    points: Tensor
    """(n^D, D)."""
    cell: float
    """The volume of a point's cell."""
    side: int


def grid(dim: int, side: int, edge: float = EDGE) -> Grid:
    line = torch.linspace(-edge, edge, side)
    points = torch.cartesian_prod(*[line] * dim).view(-1, dim)
    return Grid(points, (2 * edge / (side - 1)) ** dim, side)


@pytest.fixture(params=[1, 2])
def model(request: pytest.FixtureRequest) -> GenerativeModel:
    """A decoder bent enough that the posterior is skewed or has more than one mode."""
    model = GenerativeModel(Decoder(request.param, PIXELS, (6,)), request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1.5)
    return model


@torch.no_grad()
def log_joint_on(grid: Grid, model: GenerativeModel, x: Tensor) -> Tensor:
    """log p(x, z) of one image at all points of the grid."""
    return model.log_joint(x.expand(len(grid.points), -1), grid.points)


def exact_log_likelihood(model: GenerativeModel, images: Tensor) -> Tensor:
    fine = grid(model.latent_dim, 2001 if model.latent_dim == 1 else 101)
    sums = [log_joint_on(fine, model, x).logsumexp(dim=0) for x in images]
    return torch.stack(sums) + math.log(fine.cell)


def test_quadrature_sums_to_one_over_all_images() -> None:
    torch.manual_seed(0)
    model = GenerativeModel(Decoder(2, 3, (6,)), 2)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    assert float(exact_log_likelihood(model, images).exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.fixture(params=["prior", "encoder", "fitted"])
def start(request: pytest.FixtureRequest, model: GenerativeModel) -> Start:
    encoder = Wide(model.latent_dim)
    starts: dict[str, Start] = {
        "prior": "prior",
        "encoder": encoder,
        "fitted": FittedStart(encoder),
    }
    return starts[request.param]


def test_estimates_agree_with_quadrature(model: GenerativeModel, start: Start) -> None:
    images = model.sample(5, torch.Generator().manual_seed(1))[0]
    result = estimate_log_likelihood(model, images, AISSettings(200, 100, 5), start)
    error = (result.log_likelihood - exact_log_likelihood(model, images)).abs()
    assert (error < 5 * result.standard_error).all()


def test_bounds_enclose_the_value_of_quadrature(
    model: GenerativeModel, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, drawn = model.sample, []
    monkeypatch.setattr(model, "sample", lambda *given: drawn.append(sample(*given)) or drawn[-1])
    for count in (2, 20):
        bounds = bidirectional_bounds(model, 300, AISSettings(4, count, 5), start)
        exact = exact_log_likelihood(model, drawn[-1][0])
        for difference in (exact - bounds.lower, bounds.upper - exact):
            assert difference.mean() > -5 * difference.std() / 300**0.5


# Fitted Gaussians are so close to these posteriors that two temperatures are as good as twenty.
@pytest.mark.parametrize("start", ["prior", "encoder"], indirect=True)
def test_more_temperatures_bring_the_bounds_together(model: GenerativeModel, start: Start) -> None:
    loose, tight = (
        bidirectional_bounds(model, 300, AISSettings(4, count, 5), start) for count in (2, 20)
    )
    error = math.hypot(loose.gap_standard_error, tight.gap_standard_error)
    assert loose.gap - tight.gap > 5 * error


class Move(NamedTuple):
    weight: float
    proposal: Tensor
    acceptance: Tensor


def moves(kernel: Kernel, model: GenerativeModel, x: Tensor, points: Tensor) -> list[Move]:
    """Return where a step may lead from each point, over a grid of momenta and both directions."""
    momenta = grid_of_momenta(model.latent_dim)
    weights = torch.softmax(-0.5 * momenta.square().sum(dim=1), dim=0).tolist()
    energy = model.energy(x.expand(len(points), -1))
    state, ones = kernel.init(points, energy), torch.ones(len(points))
    found = []
    for momentum, weight in zip(momenta, weights, strict=True):
        for direction in (-1.0, 1.0):
            noise = Noise(momentum.expand_as(points), direction * ones, ones)
            _, info = kernel.step(state, energy, noise)
            found.append(Move(0.5 * weight, info.proposal, info.acceptance))
    return found


def ratio_after_a_step(moves: list[Move], grid: Grid, ratio: Tensor) -> Tensor:
    """Return the next step's density over the posterior's, at the points of the grid.

    The transition is reversible, so that r'(z) = E[r(Z')], Z' being where a step from z leads:
    an integral over momentum and direction, with r interpolated at the proposals.
    """
    total = torch.zeros_like(ratio)
    for weight, proposal, acceptance in moves:
        total += weight * torch.lerp(ratio, interpolate(ratio, grid, proposal), acceptance)
    return total


def grid_of_momenta(dim: int) -> Tensor:
    return grid(dim, 61 if dim == 1 else 15, edge=5.0).points


def interpolate(values: Tensor, grid: Grid, points: Tensor) -> Tensor:
    dim = grid.points.shape[1]
    shape = [1] * (2 - dim) + [grid.side] * dim
    # grid_sample takes the last coordinate first; a missing one is held at the middle.
    places = torch.nn.functional.pad((points / EDGE).flip(-1), (0, 2 - dim))
    field = values.view(1, 1, *shape)
    options = {"mode": "bicubic", "padding_mode": "border", "align_corners": True}
    found = grid_sample(field, places.view(1, 1, -1, 2), **options)  # type: ignore[arg-type]
    return found.flatten().clamp_min(0)  # a cubic may overshoot beside a steep slope


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hmc", "untrained l2hmc"])
def test_no_step_takes_the_chain_farther_from_the_posterior(
    model: GenerativeModel, kind: str
) -> None:
    dim = model.latent_dim
    kernel: Kernel = HMC(3, 0.25)
    if kind == "untrained l2hmc":
        kernel = L2HMC(dim, 3, 0.2, hidden=5, head_scale=2.0)
    x = model.sample(1, torch.Generator().manual_seed(3))[0]
    points = grid(dim, 401 if dim == 1 else 61)
    log_joint = log_joint_on(points, model, x)
    posterior = torch.softmax(log_joint, dim=0)  # the mass of each cell
    q = DiagonalGaussian(torch.full((1, dim), 0.4), torch.full((1, dim), math.log(0.35)))
    ratio = q.log_prob(points.points).exp() * points.cell / posterior
    divergences, steps = [], moves(kernel, model, x, points.points)
    for _ in range(6):
        # grid_sample's interpolation errs by 0.3 % at this spacing in two dimensions, by a
        # quarter of that at half of it.
        assert float((posterior * ratio).sum()) == pytest.approx(1, abs=4e-3)
        divergences.append(float(torch.xlogy(posterior * ratio, ratio).sum()))
        ratio = ratio_after_a_step(steps, points, ratio)
    for before, after in pairwise(divergences):
        assert after <= before, divergences
    assert divergences[-1] < 0.5 * divergences[0]
