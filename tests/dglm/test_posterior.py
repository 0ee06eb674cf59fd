"""Long chains on one image, and the shape that they show."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dglm import GenerativeModel, long_chains, principal_axes
from dglm.posterior import ChainMeans, Estimate, LongChains, PrincipalAxes, between_chains
from samplers import HMC, L2HMC, sample, seeded_generator
from samplers.adaptation import Moments


def some_axes() -> PrincipalAxes:
    return PrincipalAxes.of(Moments.of(torch.randn(50, 3)))


def test_a_skewed_posterior_is_that_of_quadrature() -> None:
    decoder = nn.Linear(2, 3)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[6.0, 0.0], [0.0, 3.0], [0.0, -3.0]]))
        decoder.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    model, x = GenerativeModel(decoder, 2), torch.tensor([1.0, 1.0, 1.0])
    z = torch.cartesian_prod(torch.linspace(-8, 8, 2001), torch.zeros(1))
    weight = model.log_joint(x.expand(len(z), -1), z).detach().softmax(dim=0)
    mean = (weight * z[:, 0]).sum()
    central = [(weight * (z[:, 0] - mean) ** power).sum() for power in (2, 3, 4)]

    kernel, energy = HMC(4, 0.5), model.energy(x.expand(200, -1))
    generator = seeded_generator("cpu", 0)
    axes, position = principal_axes(kernel, energy, torch.zeros(200, 2), 60, generator)
    means = long_chains(kernel, energy, position, 400, axes, generator).means
    assert axes.directions[0, 0] > 0.98  # the second coordinate is narrow
    assert means.effective_sample_size().value.min() > 3000
    first = means.coordinates[:, 0].mean(dim=0) * axes.std + axes.mean
    errors = axes.std / means.effective_sample_size().value.sqrt()
    assert ((first - torch.stack([mean, torch.zeros(())])).abs() < 5 * errors).all()
    # Where axes are a little off, so is the skewness, by less than 1 - 0.98³.
    found, exact = means.skewness(), float(central[1] / central[0] ** 1.5)
    assert found.standard_error < 0.03
    assert abs(found.value - exact) < 5 * found.standard_error + 0.06 * exact
    assert exact > 0.4


def test_running_means_are_those_of_all_draws(model: GenerativeModel, images: Tensor) -> None:
    kernel, energy = HMC(2, 0.3), model.energy(images)
    start = torch.randn(7, 3)
    axes = some_axes()
    found = long_chains(kernel, energy, start, 420, axes, seeded_generator("cpu", 1))
    whole = sample(kernel, energy, start, 420, generator=seeded_generator("cpu", 1))
    for running, exact in zip(found.means, ChainMeans.of(axes, whole.draws), strict=True):
        assert torch.allclose(running, exact)
    assert torch.allclose(found.acceptance, whole.acceptance.mean(dim=1))
    assert torch.equal(found.draws, whole.draws[:, 2::3])  # 140 of at most 200


@pytest.mark.parametrize("num_steps", [3, 200, 201])
def test_memory_does_not_grow_with_the_number_of_steps(
    model: GenerativeModel, images: Tensor, num_steps: int
) -> None:
    axes = some_axes()
    start, generator = torch.zeros(7, 3), seeded_generator("cpu", 0)
    found = long_chains(HMC(1, 0.1), model.energy(images), start, num_steps, axes, generator)
    assert min(num_steps, 100) <= found.draws.shape[1] <= 200


def test_gradients_are_counted_and_progress_is_told(
    model: GenerativeModel, images: Tensor, gradients: list[int]
) -> None:
    kernel = L2HMC(3, 2, 0.3, 4, observation_dim=6, embedding_hidden=(4,))
    axes = some_axes()
    steps: list[int] = []
    found = long_chains(
        kernel,
        model.energy(images),
        torch.zeros(7, 3),
        120,
        axes,
        seeded_generator("cpu", 0),
        kernel.embed(images),
        steps.append,
    )
    assert found.gradient_evaluations == sum(gradients) == 7 * (2 * 120 + 1)
    assert sum(steps) == 120


def test_axes_are_those_of_the_second_half(model: GenerativeModel, images: Tensor) -> None:
    kernel, energy = HMC(2, 0.3), model.energy(images)
    start = torch.full((7, 3), 5.0)
    axes, position = principal_axes(kernel, energy, start, 130, seeded_generator("cpu", 1))
    draws = sample(kernel, energy, start, 130, generator=seeded_generator("cpu", 1)).draws
    exact = PrincipalAxes.of(Moments.of(draws[:, 65:].flatten(0, 1)))
    for one, other in zip(axes, exact, strict=True):
        assert torch.allclose(one, other)
    assert torch.equal(position, draws[:, -1])


class Stopped(Exception):
    """Stands for whatever ends a run early."""


@pytest.mark.parametrize("stops", [[50], [100, 150], [120], [420]])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    model: GenerativeModel, images: Tensor, tmp_path: Path, stops: list[int]
) -> None:
    kernel, energy, start = HMC(2, 0.3), model.energy(images), torch.randn(7, 3)
    axes, path = some_axes(), tmp_path / "chains.pt"

    def run(generator: torch.Generator, stop: int, checkpoint: Path | None) -> LongChains:
        done = 0

        def progress(steps: int) -> None:
            nonlocal done
            done += steps
            if done >= stop:
                raise Stopped

        return long_chains(kernel, energy, start, 420, axes, generator, None, progress, checkpoint)

    expected_generator, generator = seeded_generator("cpu", 1), seeded_generator("cpu", 1)
    expected = run(expected_generator, 1000, None)
    for stop in stops:
        with pytest.raises(Stopped):
            run(seeded_generator("cpu", 1), stop, path)
    found = run(generator, 1000, path)
    assert all(map(torch.equal, found.means, expected.means))
    assert all(map(torch.equal, found[1:4], expected[1:4]))
    assert found.gradient_evaluations == expected.gradient_evaluations
    assert torch.equal(generator.get_state(), expected_generator.get_state())
    assert [file.name for file in tmp_path.iterdir()] == ["chains.pt"]


def test_a_run_is_saved_now_and_then_and_by_others_refused(
    model: GenerativeModel, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dglm.posterior._SAVE_SECONDS", 0)
    axes, path = some_axes(), tmp_path / "chains.pt"
    saved: list[int] = []

    def run(num_steps: int, seed: int) -> LongChains:
        return long_chains(
            HMC(1, 0.1),
            model.energy(images),
            torch.zeros(7, 3),
            num_steps,
            axes,
            seeded_generator("cpu", seed),
            progress=lambda steps: saved.append(path.exists()),
            checkpoint=path,
        )

    with pytest.raises(ValueError, match="at least 1, got 0"):
        run(0, seed=0)
    run(120, seed=0)
    assert saved == [False, True, True]
    for num_steps, seed in ((121, 0), (120, 1)):
        with pytest.raises(ValueError, match=r"chains\.pt is of another run"):
            run(num_steps, seed)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"chains\.pt cannot be gone on from"):
        run(120, seed=0)


# The shape along principal axes

CHAINS, DRAWS = 200, 500


def along_first_axis(u: Tensor) -> ChainMeans:
    """Return the means of draws (chain, draw) of a distribution of mean 0 and variance 1."""
    axes = PrincipalAxes.of(Moments(torch.zeros(2), torch.tensor([1.0, 0.5]).diag()))
    return ChainMeans.of(axes, torch.stack([u, 0.5**0.5 * torch.randn_like(u)], dim=-1))


def autoregressive(chains: int, draws: int, memory: float) -> Tensor:
    """Return stationary chains of standard normal draws with autocorrelations memory^t."""
    noise = torch.randn(draws, chains) * (1 - memory**2) ** 0.5
    x = [torch.randn(chains)]
    for step in noise[1:]:
        x.append(memory * x[-1] + step)
    return torch.stack(x, dim=1)


def gamma(shape: float, size: tuple[int, int]) -> Tensor:
    """Return standardised gamma variables."""
    rate = torch.ones(())
    draws = torch.distributions.Gamma(torch.tensor(shape), rate).sample(size)
    return (draws - shape) / shape**0.5


def close(found: Estimate, exact: float, required: float) -> bool:
    """Return whether an estimate is within five standard errors, which must be small enough."""
    assert 0 < found.standard_error < required
    return bool((found.value - exact).abs() < 5 * found.standard_error)


@pytest.mark.parametrize(
    ("draw", "skewness", "kurtosis", "errors"),
    [
        (lambda: gamma(4.0, (CHAINS, DRAWS)), 1.0, 1.5, (0.03, 0.15)),
        (lambda: gamma(1.0, (CHAINS, DRAWS)), 2.0, 6.0, (0.05, 0.6)),
        (lambda: 12**0.5 * (torch.rand(CHAINS, DRAWS) - 0.5), 0.0, -1.2, (0.01, 0.01)),
        (lambda: torch.randn(CHAINS, DRAWS), 0.0, 0.0, (0.03, 0.03)),
    ],
    ids=["gamma", "exponential", "uniform", "Gaussian"],
)
def test_distributions_have_their_known_shape(
    draw: Callable[[], Tensor], skewness: float, kurtosis: float, errors: tuple[float, float]
) -> None:
    means = along_first_axis(draw())
    assert close(means.skewness(), skewness, errors[0])
    assert close(means.excess_kurtosis(), kurtosis, errors[1])


def test_location_and_scale_do_not_matter() -> None:
    u = gamma(4.0, (CHAINS, DRAWS))
    plain, moved = along_first_axis(u), along_first_axis(0.7 * u - 0.3)
    for name in ("skewness", "excess_kurtosis"):
        one, other = getattr(plain, name)(), getattr(moved, name)()
        assert torch.allclose(torch.stack(one), torch.stack(other))


@pytest.mark.parametrize("name", ["skewness", "excess_kurtosis"])
def test_errors_are_as_large_as_the_scatter_of_autocorrelated_chains(name: str) -> None:
    repeats, chains = 100, 30
    u = 5 * ((0.2 * autoregressive(repeats * chains, DRAWS, 0.6)).exp() - 1)
    found = [getattr(along_first_axis(part), name)() for part in u.split(chains)]
    values, errors = (torch.stack(parts) for parts in zip(*found, strict=True))
    ratio = values.std() / errors.square().mean().sqrt()
    # The error of a standard deviation of Gaussian figures.
    assert abs(ratio.log()) < 5 / (2 * repeats) ** 0.5


@pytest.mark.parametrize("memory", [0.0, 0.8, -0.8])
def test_effective_sample_size_is_that_of_an_autoregression(memory: float) -> None:
    draws = torch.stack([autoregressive(2000, DRAWS, memory), torch.randn(2000, DRAWS)], dim=-1)
    axes = PrincipalAxes.of(Moments(torch.zeros(2), torch.tensor([1.0, 0.9]).diag()))
    means = ChainMeans.of(axes, draws)
    for power in (1, 2):
        found = means.effective_sample_size(power)
        lag = memory**power
        # Var(mean of n) · n / Var = 1 + 2 Σ (1 - t / n) φ^t, the sum in closed form.
        inverse = (1 + lag) / (1 - lag) - 2 * lag * (1 - lag**DRAWS) / DRAWS / (1 - lag) ** 2
        exact = 2000 * DRAWS * torch.tensor([1 / inverse, 1.0])
        assert (found.standard_error < 0.05 * exact).all()
        assert ((found.value - exact).abs() < 5 * found.standard_error).all()


def test_the_error_of_a_mean_and_of_its_square() -> None:
    features = 3 + torch.randn(30, 1)
    mean, error = features.mean(), features.std() / 30**0.5
    found = between_chains(lambda expectation: expectation[0], features)
    assert torch.allclose(torch.stack(found), torch.stack([mean, error]))
    found = between_chains(lambda expectation: expectation[0].square(), features)
    assert torch.allclose(torch.stack(found), torch.stack([mean.square(), 2 * mean * error]))


def test_one_chain_has_no_error() -> None:
    with pytest.raises(ValueError, match="between chains need at least 2, got 1"):
        along_first_axis(torch.randn(1, 50)).skewness()


@pytest.fixture
def rotated() -> Moments:
    """Three coordinates, two of them correlated."""
    covariance = torch.tensor([[2.0, 1.5, 0.0], [1.5, 2.0, 0.0], [0.0, 0.0, 1.0]])
    return Moments(torch.tensor([1.0, -1.0, 0.0]), covariance)


def test_principal_axes_are_the_widest_directions(rotated: Moments) -> None:
    axes = PrincipalAxes.of(rotated)
    assert torch.allclose(axes.directions[0].abs(), torch.tensor([0.5, 0.5, 0.0]).sqrt())
    assert axes.directions[0].max() > 0.7
    assert torch.allclose(axes.directions[1], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.allclose(axes.scale, torch.tensor([3.5, 1.0]).sqrt())
    assert torch.allclose(axes.std, torch.tensor([2.0, 2.0, 1.0]).sqrt())


def test_draws_are_standardised_in_the_plane(rotated: Moments) -> None:
    distribution = torch.distributions.MultivariateNormal(*rotated)
    projected = PrincipalAxes.of(rotated).project(distribution.sample((10_000,)))
    assert projected.mean(dim=0).abs().max() < 5 / 100
    assert (projected.T.cov() - torch.eye(2)).abs().max() < 5 * 2**0.5 / 100


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (lambda: Moments(torch.zeros(1), torch.ones(1, 1)), "at least 2 coordinates, got 1"),
        (lambda: Moments(torch.zeros(2), torch.tensor([1.0, 0.0]).diag()), "did not move"),
    ],
)
def test_what_has_no_plane_is_refused(moments: Callable[[], Moments], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrincipalAxes.of(moments())
