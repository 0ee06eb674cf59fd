from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from dglm import GenerativeModel, long_chains, principal_axes
from dglm.posterior import ChainMeans, LongChains, PrincipalAxes
from samplers import HMC, L2HMC, sample, seeded_generator
from samplers.adaptation import Moments

Model = Callable[..., GenerativeModel]
ExactPosterior = Callable[[GenerativeModel, Tensor], MultivariateNormal]


def some_axes() -> PrincipalAxes:
    return PrincipalAxes.of(Moments.of(torch.randn(50, 3)))


def run_long(
    model: GenerativeModel, x: Tensor, num_steps: int, warm_up: int = 60
) -> tuple[PrincipalAxes, LongChains]:
    kernel, energy, generator = HMC(4, 0.5), model.energy(x), seeded_generator("cpu", 0)
    start = torch.zeros(len(x), model.latent_dim)
    axes, position = principal_axes(kernel, energy, start, warm_up, generator)
    return axes, long_chains(kernel, energy, position, num_steps, axes, generator)


def test_a_gaussian_posterior_is_found_to_be_one(
    linear_gaussian: Model, exact_posterior: ExactPosterior
) -> None:
    model = linear_gaussian(3, 5, 1.0)
    x = model.sample(1, seeded_generator("cpu", 1))[0].expand(100, -1)
    exact = exact_posterior(model, x[:1])
    axes, chains = run_long(model, x, 300, warm_up=600)
    truth = PrincipalAxes.of(Moments(exact.mean[0], exact.covariance_matrix[0]))
    assert (axes.directions * truth.directions).sum(dim=1).abs().min() > 0.98
    assert torch.allclose(axes.scale, truth.scale, rtol=0.05)
    means = chains.means
    ess = means.effective_sample_size()
    assert ess.value.min() > 3000
    first = means.coordinates[:, 0].mean(dim=0) * axes.std + axes.mean
    assert ((first - exact.mean[0]).abs() < 5 * truth.std / ess.value.sqrt()).all()
    for estimate in (means.skewness(), means.excess_kurtosis()):
        assert estimate.value.abs() < 5 * estimate.standard_error
        assert estimate.standard_error < 0.1


def test_a_skewed_posterior_is_that_of_quadrature() -> None:
    decoder = nn.Linear(2, 3)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[6.0, 0.0], [0.0, 3.0], [0.0, -3.0]]))
        decoder.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    model = GenerativeModel(decoder, 2)
    x = torch.tensor([1.0, 1.0, 1.0])
    z = torch.cartesian_prod(torch.linspace(-8, 8, 2001), torch.zeros(1))
    weight = model.log_joint(x.expand(len(z), -1), z).detach().softmax(dim=0)
    mean = (weight * z[:, 0]).sum()
    central = [(weight * (z[:, 0] - mean) ** power).sum() for power in (2, 3, 4)]
    axes, chains = run_long(model, x.expand(200, -1), 400)
    assert axes.directions[0, 0] > 0.98  # the second coordinate is narrow
    found = chains.means.skewness()
    assert found.standard_error < 0.03
    # Where axes are a little off, so is the skewness, by less than 1 - 0.98³.
    exact = float(central[1] / central[0] ** 1.5)
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
