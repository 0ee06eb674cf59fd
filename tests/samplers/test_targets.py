from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from samplers import TARGETS, Target, seeded_generator, targets, value_and_gradient

COUNT = 10_000


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]()


@pytest.fixture
def draws(target: Target) -> Tensor:
    return target.sample(COUNT, seeded_generator("cpu", 0))


def features(target: Target, draws: Tensor) -> Tensor:
    """Return the functions of the draws, (B, F), whose means under the target are known."""
    if isinstance(target, targets.Funnel):
        levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
        below = (draws[:, None] <= target.quantiles(levels)).to(draws)
        return (below - levels[:, None]).flatten(1)
    centred = draws - target.mean
    row, column = torch.triu_indices(target.dim, target.dim)
    products = centred[:, row] * centred[:, column] - target.covariance[row, column]
    found = [centred, products]
    if isinstance(target, targets.GaussianMixture):
        found.append(target.responsibilities(draws) - target.weights)
    return torch.cat(found, dim=1)


def assert_mean_zero(values: Tensor) -> None:
    """The rows are independent, so that their number is the effective sample size."""
    standard_error = values.std(dim=0) / len(values) ** 0.5
    assert len(values) >= 2000
    assert (standard_error > 0).all()
    assert (values.mean(dim=0).abs() < 5 * standard_error).all()


def test_exact_draws_have_the_stated_moments_or_quantiles(target: Target, draws: Tensor) -> None:
    assert draws.shape == (COUNT, target.dim)
    assert_mean_zero(features(target, draws))


def test_draws_belong_to_the_energy(target: Target, draws: Tensor) -> None:
    """Stein's identity, E f(xᵢ) ∂ⱼU = E f'(xᵢ) where i = j, else 0, for f = 1 and a bounded f."""
    scale = draws.std(dim=0)
    bounded = torch.tanh((draws - target.mean) / scale)
    gradient = value_and_gradient(target, draws).gradient
    assert_mean_zero(gradient)
    assert_mean_zero(bounded * gradient - (1 - bounded.square()) / scale)
    products = bounded.mT @ gradient / COUNT
    error = (bounded.square().mT @ gradient.square()).sqrt() / COUNT
    off_diagonal = ~torch.eye(target.dim, dtype=torch.bool)
    assert (products.abs() < 5 * error)[off_diagonal].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_follows_the_type_of_the_positions(target: Target, dtype: torch.dtype) -> None:
    draws, again = (target.sample(200, seeded_generator("cpu", 0), dtype) for _ in range(2))
    assert draws.dtype == dtype
    assert torch.equal(draws, again)
    assert not torch.equal(draws, target.sample(200, dtype=dtype))
    state, exact = value_and_gradient(target, draws), value_and_gradient(target, draws.double())
    assert state.energy.dtype == state.gradient.dtype == dtype
    torch.testing.assert_close(state.energy.double(), exact.energy, rtol=1e-4, atol=1e-4)
    # The ripple of the release turns 10⁴ times within one unit: its phase has few digits left.
    spread = exact.gradient.std()
    assert ((state.gradient - exact.gradient).abs() < 3e-3 * spread).all()


def test_gradient_is_that_of_finite_differences(target: Target) -> None:
    points = target.sample(3, seeded_generator("cpu", 1)).requires_grad_()
    assert torch.autograd.gradcheck(target, points, eps=1e-7, atol=1e-4)


def test_compiles_into_one_graph(target: Target) -> None:
    torch.compiler.reset()
    points = target.sample(4, seeded_generator("cpu", 1))
    compiled = torch.compile(
        lambda position: tuple(value_and_gradient(target, position))[:3],
        fullgraph=True,
        backend="eager",
    )
    torch.testing.assert_close(compiled(points), tuple(value_and_gradient(target, points))[:3])


def test_energies_are_those_of_the_densities_that_they_say() -> None:
    turned = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5
    mean, factor = torch.randn(3), torch.randn(3, 3)
    centres, variances = torch.randn(3, 2), torch.tensor([0.5, 1.0, 3.0])
    weights = torch.tensor([0.2, 0.5, 0.3])
    parts = Independent(Normal(centres, variances.sqrt()[:, None]), 1)
    expected: list[tuple[Target, Callable[[Tensor], Tensor]]] = [
        (
            targets.ill_conditioned_gaussian(),
            lambda x: -0.5 * (x.square() / torch.logspace(-2, 2, 50)).sum(dim=-1),
        ),
        *(
            (
                targets.strongly_correlated_gaussian(small),
                lambda x, small=small: (
                    -0.5 * (x @ turned).square() @ torch.tensor([0.01, 1 / small])
                ),
            )
            for small in (1e-2, 0.1)
        ),
        (
            targets.GaussianTarget(mean, factor @ factor.mT),
            MultivariateNormal(mean, factor @ factor.mT).log_prob,
        ),
        (
            targets.GaussianMixture(centres, variances, weights),
            MixtureSameFamily(Categorical(weights), parts).log_prob,
        ),
        *(
            (
                target,
                lambda x, width=width: (
                    -(0.5 * x.square() + 1e-2 * torch.cos(x / width)).sum(dim=-1)
                ),
            )
            for target, width in (
                (TARGETS["rough_well"](), 1e-2),
                (targets.RoughWell(width=1e-4), 1e-4),
            )
        ),
        # The ridge bends through x₂ = b (x₁² - σ²).
        (
            targets.Banana(variance=4.0, curvature=0.5),
            lambda x: -(x[:, 0] ** 2) / 8 - (x[:, 1] - 0.5 * (x[:, 0] ** 2 - 4)) ** 2 / 2,
        ),
    ]
    for target, log_density in expected:
        points = torch.randn(6, target.dim)
        difference = target(points) + log_density(points)
        torch.testing.assert_close(difference, difference[:1].expand(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixture_is_finite_far_away(dtype: torch.dtype) -> None:
    target = TARGETS["mog"]()
    state = value_and_gradient(target, torch.tensor([[-1e8, 3.0], [1e4, -1e6]], dtype=dtype))
    assert state.energy.isfinite().all()
    expected = torch.tensor([[-(1e8 - 2) / 0.1, 30.0], [(1e4 - 2) / 0.1, -1e7]], dtype=dtype)
    torch.testing.assert_close(state.gradient, expected)


def test_modes_of_the_mixtures_are_apart() -> None:
    for name in ("mog", "mog_unequal"):
        target = TARGETS[name]()
        line = torch.stack([torch.linspace(-4, 4, 2001), torch.zeros(2001)], dim=1)
        between = target(line).max() - target(target.centres)
        assert (between > 7).all()


@pytest.mark.parametrize(
    ("amplitude", "width"), [(1e-2, 1e-2), (1.0, 0.5), (0.5, 0.2), (3.0, 1.0), (2.0, 4.0)]
)
def test_rough_well_has_the_variance_of_brute_force(amplitude: float, width: float) -> None:
    target = targets.RoughWell(1, amplitude, width)
    points = torch.linspace(-12, 12, 200_001)[:, None]
    probability = (-target(points)).softmax(dim=0)
    variance = probability @ points[:, 0].square()
    torch.testing.assert_close(target.covariance, variance.reshape(1, 1), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("amplitude", "width"), [(1.0, 0.5), (3.0, 1.0)])
def test_deep_wells_are_drawn_exactly(amplitude: float, width: float) -> None:
    target = targets.RoughWell(2, amplitude, width)
    assert abs(target.covariance[0, 0] - 1) > 0.1
    draws = target.sample(COUNT, seeded_generator("cpu", 0))
    assert_mean_zero(features(target, draws))
    # The depth of the wells, which moments hardly see.
    points = torch.linspace(-12, 12, 200_001)[:, None]
    probability = (-targets.RoughWell(1, amplitude, width)(points)).softmax(dim=0)
    assert_mean_zero(torch.cos(draws / width) - probability @ torch.cos(points[:, 0] / width))


def test_quantiles_of_the_funnel_by_symmetry() -> None:
    quantiles = targets.Funnel(3).quantiles(torch.tensor([0.25, 0.5, 0.75]))
    assert torch.equal(quantiles[1], torch.zeros(3))
    torch.testing.assert_close(quantiles[0], -quantiles[2])
    torch.testing.assert_close(quantiles[2, 0], torch.tensor(3 * 0.6744897501960817))


IMPOSSIBLE: list[tuple[Callable[[], Target], str]] = [
    (
        lambda: targets.GaussianTarget(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
        "positive",
    ),
    (
        lambda: targets.GaussianTarget(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
        "symmetric",
    ),
    (lambda: targets.GaussianMixture([[0.0]], [-1.0]), "must be positive"),
    (lambda: targets.GaussianMixture([[0.0], [1.0]], [1.0, 1.0], [0.3, 0.3]), "sum to one"),
    (lambda: targets.RoughWell(amplitude=0.0), "amplitude and width must be positive"),
    (lambda: targets.RoughWell(width=-1.0), "amplitude and width must be positive"),
    (lambda: targets.Funnel(1), "at least 2 dimensions"),
    (lambda: targets.Banana(variance=0.0), "variance must be positive"),
]


@pytest.mark.parametrize(("build", "message"), IMPOSSIBLE)
def test_impossible_parameters_are_refused(build: Callable[[], Target], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
