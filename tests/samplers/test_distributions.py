import math

import pytest
import torch
from torch.distributions import (
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    Gamma,
    HalfNormal,
    Independent,
    LKJCholesky,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    TransformedDistribution,
    Uniform,
    VonMises,
)
from torch.distributions.transforms import AbsTransform

from samplers import HMC, DistributionEnergy, adapt, sample, seeded_generator, summarise

CORRELATED = torch.tensor([[2.0, 1.0], [1.0, 1.0]])


def independent(kind: type[Distribution], *parameters: list[float]) -> Distribution:
    return Independent(kind(*map(torch.tensor, parameters)), 1)


CASES: dict[str, Distribution] = {
    "normal": MultivariateNormal(torch.tensor([1.0, -1.0]), CORRELATED),
    "gamma": independent(Gamma, [3.0, 8.0], [1.0, 4.0]),
    "half-normal": independent(HalfNormal, [1.0, 3.0]),
    "beta": independent(Beta, [2.0, 5.0], [3.0, 1.5]),
    "Dirichlet": Dirichlet(torch.tensor([2.0, 3.0, 4.0])),
}


@pytest.mark.parametrize("distribution", CASES.values(), ids=CASES.keys())
def test_draws_have_the_moments_of_the_distribution(distribution: Distribution) -> None:
    energy = DistributionEnergy(distribution)
    generator = seeded_generator("cpu", 0)
    start = 0.1 * torch.randn(100, energy.dim, generator=generator)
    # One leapfrog: several may come near a half or a whole period, where chains mix badly.
    warm = adapt(HMC(1), energy, start, 300, mass="diagonal", generator=generator)
    chains = sample(warm.kernel, energy, warm.position, 400, generator=generator)
    x = energy.constrain(chains.draws).double()
    assert distribution.support.check(x).all()
    mean, variance = distribution.mean.double(), distribution.variance.double()
    for values, exact in ((x, mean), ((x - mean).square(), variance)):
        summary = summarise(values)
        assert summary.ess_bulk.min() > 2000
        assert ((values.mean(dim=(0, 1)) - exact).abs() < 5 * summary.mcse).all()


def test_energy_is_that_of_the_change_of_variables() -> None:
    energy = DistributionEnergy(independent(Gamma, [3.0], [2.0]))
    u = torch.tensor([[-0.7], [0.4]])
    # p(exp u) exp u, with p(x) = 2³ x² exp(-2x) / Γ(3).
    expected = -(math.log(8.0) - math.log(2.0) + 3 * u - 2 * u.exp())[:, 0]
    torch.testing.assert_close(energy(u), expected)


def test_a_diverged_trajectory_is_no_error() -> None:
    # Asked for: torch.compile, used by other tests, switches the validation off for a process.
    rates = torch.tensor([1.0, 4.0])
    gamma = Gamma(torch.tensor([3.0, 8.0]), rates, validate_args=True)
    distribution = Independent(gamma, 1, validate_args=True)
    energy = DistributionEnergy(distribution)
    kernel = HMC(3, 100.0)
    state = kernel.init(torch.zeros(20, 2), energy)
    _, info = kernel.step(state, energy, kernel.noise(state, seeded_generator("cpu", 0)))
    assert info.diverging.any()
    assert not info.accepted[info.diverging].any()
    with pytest.raises(ValueError, match="support"):  # the user's own is as it was
        distribution.log_prob(torch.tensor([-1.0, 1.0]))


def test_a_simplex_has_a_coordinate_less() -> None:
    assert DistributionEnergy(CASES["Dirichlet"]).dim == 2


def test_chains_of_another_dimension_are_refused() -> None:
    for name, dim in (("Dirichlet", 3), ("gamma", 5)):
        with pytest.raises(ValueError, match=f"unconstrained coordinates, the chains have {dim}"):
            sample(HMC(), DistributionEnergy(CASES[name]), torch.zeros(4, dim), 2)


def test_a_mixture_is_an_energy() -> None:
    parts = MultivariateNormal(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.eye(2))
    mixture = MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7])), parts)
    x = torch.randn(5, 2)
    torch.testing.assert_close(DistributionEnergy(mixture)(x), -mixture.log_prob(x))


def von_mises(*shape: int) -> Distribution:
    return Independent(VonMises(torch.zeros(shape), torch.ones(shape)), 1)


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (Normal(0.0, 1.0), r"wrap it in .*Independent"),
        (Normal(torch.zeros(2), torch.ones(2)), r"wrap it in .*Independent"),
        (Independent(Poisson(torch.ones(2)), 1), "has the support .*: gradients need one"),
        (LKJCholesky(3), "is a distribution of matrices"),
        (
            TransformedDistribution(Independent(Normal(torch.zeros(2), 1.0), 1), AbsTransform()),
            "the density of this Transformed.* cannot be evaluated: a transform inside has no inv",
        ),
        (von_mises(2), "is periodic"),
        (MixtureSameFamily(Categorical(torch.ones(2)), von_mises(2, 1)), "is periodic"),
    ],
)
def test_what_has_no_gradients_everywhere_is_refused(
    distribution: Distribution, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DistributionEnergy(distribution)


def test_a_mixture_of_one_support_is_mapped_and_of_several_refused() -> None:
    low = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    weights = Categorical(torch.tensor([0.2, 0.3, 0.5]))
    for high, fits in ((low + 2, True), (low + torch.tensor([[1.0], [2.0], [3.0]]), False)):
        mixture = MixtureSameFamily(weights, Independent(Uniform(low, high), 1))
        if not fits:
            with pytest.raises(ValueError, match="other supports than one another"):
                DistributionEnergy(mixture)
            continue
        energy = DistributionEnergy(mixture)
        y = torch.randn(3, 2)  # as many rows as components
        s = torch.sigmoid(y)
        expected = -(s * (1 - s)).log().sum(dim=1)  # of the logistic distribution
        torch.testing.assert_close(energy(y), expected)


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_both_ends_of_an_interval_are_there_in_float32(shift: float) -> None:
    half, low = torch.tensor([0.5]).float(), torch.tensor([shift]).float()
    distribution = Beta(half, half) if shift == 0 else Uniform(low, low + 1)
    energy = DistributionEnergy(Independent(distribution, 1))
    y = torch.tensor([[3.0], [10.0], [20.0]]).float()
    assert energy(y).dtype == torch.float32
    # Both have a density of y that is even, and tails that go on beyond the digits of float32.
    torch.testing.assert_close(energy(y), energy(-y), rtol=1e-4, atol=1e-4)
    assert (energy(y).diff() > 3).all()
    assert shift < energy.constrain(-y).min()
    assert energy.constrain(y).max() < shift + 1
