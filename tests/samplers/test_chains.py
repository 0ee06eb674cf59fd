from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import (
    HMC,
    L2HMC,
    Energy,
    adapt,
    parallel_tempering,
    sample,
    sample_chunks,
    seeded_generator,
)
from samplers.energy import Counted


@pytest.fixture
def kernel() -> HMC:
    return HMC(num_leapfrogs=2, step_size=0.8)


@pytest.mark.parametrize("thin", [1, 3])
def test_draws_are_those_of_single_steps(kernel: HMC, energy: Energy, thin: int) -> None:
    generator = seeded_generator("cpu", 4)
    chains = sample(
        kernel, energy, torch.zeros(5, 3), 7, thin=thin, generator=seeded_generator("cpu", 4)
    )
    state = kernel.init(torch.zeros(5, 3), energy)
    for draw in range(7):
        acceptance = torch.zeros(5)
        for _ in range(thin):
            state, info = kernel.step(state, energy, kernel.noise(state, generator))
            acceptance += info.acceptance / thin
        assert torch.equal(chains.draws[:, draw], state.position)
        assert torch.equal(chains.energy[:, draw], state.energy)
        torch.testing.assert_close(chains.acceptance[:, draw], acceptance)
    assert chains.draws.shape == (5, 7, 3)
    assert 0.1 < chains.acceptance.mean() < 0.99


@torch.no_grad()
@pytest.mark.parametrize("thin", [1, 2])
def test_compiling_several_steps_together_changes_no_draw(
    kernel: HMC, energy: Energy, thin: int, compiler: Any
) -> None:
    def draws(chunk_size: int = 100) -> list[Tensor]:
        chunks = sample_chunks(
            kernel,
            energy,
            torch.zeros(5, 3),
            8,
            chunk_size=chunk_size,
            thin=thin,
            generator=seeded_generator("cpu", 4),
        )
        fields = zip(*(chunk for chunk, _ in chunks), strict=True)
        return [torch.cat(parts, dim=1) for parts in fields]

    expected = draws()
    kernel.compile(steps=3, backend=compiler)
    torch.testing.assert_close(draws(), expected)
    assert len(compiler.graphs) == 2  # of three steps and, for what is left, of one
    torch.testing.assert_close(draws(chunk_size=5), expected)


def test_thinning_hides_no_divergence(energy: Energy, plant: Callable[..., Energy]) -> None:
    rows = torch.tensor([True, False, True, False])
    broken = plant(energy, "nan", rows, 2)  # Call 0 is the start, 2 the second of three steps.
    chains = sample(HMC(1, 0.5), broken, torch.zeros(4, 3), 2, thin=3)
    assert torch.equal(chains.diverging[:, 0], rows)
    assert not chains.diverging[:, 1].any()
    assert chains.draws.isfinite().all()


DRAWS: dict[str, Callable[..., Tensor]] = {
    "sample": lambda energy, start, **noise: sample(HMC(2), energy, start, 4, **noise).draws,
    "sample_chunks": lambda energy, start, **noise: (
        next(sample_chunks(HMC(2), energy, start, 4, **noise))[0].draws
    ),
    "adapt": lambda energy, start, **noise: adapt(HMC(2), energy, start, 20, **noise).position,
    "parallel_tempering": lambda energy, start, **noise: (
        parallel_tempering(energy, start, 3, torch.tensor([1.0, 2.0]), **noise).draws
    ),
}
every_way = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@every_way
def test_noise_is_the_generator_s_or_torch_s_own(
    draw: Callable[..., Tensor], energy: Energy
) -> None:
    start = torch.zeros(5, 3)
    torch.manual_seed(3)
    first, on = draw(energy, start), draw(energy, start)
    assert not torch.equal(first, on)  # going on is new noise
    torch.manual_seed(3)
    assert torch.equal(draw(energy, start), first)
    before = torch.get_rng_state()
    assert torch.equal(draw(energy, start, generator=torch.Generator().manual_seed(3)), first)
    assert torch.equal(torch.get_rng_state(), before)


@every_way
def test_starts_of_other_types_are_understood(draw: Callable[..., Tensor], energy: Energy) -> None:
    def draws(start: Any) -> Tensor:
        return draw(energy, start, generator=seeded_generator("cpu", 1))

    zeros, array = torch.zeros(5, 3), np.zeros((5, 3))
    expected = draws(zeros)
    for start in (array, array.astype(np.float32), array.tolist(), zeros.long(), zeros.bfloat16()):
        assert torch.equal(draws(start), expected)


@every_way
def test_starts_that_cannot_be_are_refused_in_one_line(
    draw: Callable[..., Tensor], energy: Energy
) -> None:
    for shape in ((3,), (2, 5, 3), (0, 3), (5, 0)):
        with pytest.raises(ValueError, match=r"^.*shape \(chains, dim\), got.*$"):
            draw(energy, torch.zeros(shape))
    start = torch.tensor([[1.0], [0.0], [2.0]])
    for broken in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match=r"^.*not finite at the start of 2 of the chains$"):
            draw(lambda x, broken=broken: torch.where(x > 0, broken, x.square())[:, 0], start)
    with pytest.raises(ValueError, match="gradient is not finite at the start of 1 of the chains"):
        draw(lambda x: x.abs().sqrt().sum(dim=-1), start)


def test_chunks_are_put_together_and_progress_is_told(kernel: HMC, energy: Energy) -> None:
    told: list[int] = []
    given = kernel, energy, torch.zeros(2, 3)
    chains = sample(*given, 250, generator=seeded_generator("cpu"), progress=told.append)
    assert told == [100, 200, 250]
    whole, _ = next(sample_chunks(*given, 250, chunk_size=250, generator=seeded_generator("cpu")))
    assert all(map(torch.equal, chains, whole))


def outside_one(z: Tensor) -> Tensor:
    """A half-normal below 1, whose Cholesky factor does not exist above."""
    factor = torch.linalg.cholesky(1 - z[:, :, None])
    return 0.5 * z.square().sum(dim=1) + 0 * factor[:, 0, 0]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_trial_at_which_the_energy_raises_is_a_counted_divergence(
    compiled: bool, request: pytest.FixtureRequest
) -> None:
    kernel = HMC(3, 0.5)
    if compiled:
        compiler = request.getfixturevalue("compiler")
        # "eager" would keep the hooks of torch.func disabled where the energy has raised.
        compiler.backend = "aot_eager"
        kernel.compile(backend=compiler)
    generator = seeded_generator("cpu", 0)
    chains = sample(kernel, outside_one, torch.zeros(40, 1), 60, generator=generator)
    assert 0.05 < chains.diverging.double().mean() < 0.5
    draws = chains.draws[:, 20:, 0]
    assert draws.max() < 1
    below = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(1.0))
    exact = -(-0.5 * torch.ones(())).exp() / (2 * torch.pi) ** 0.5 / below
    per_chain = draws.mean(dim=1)
    assert (per_chain.mean() - exact).abs() < 5 * per_chain.std() / 40**0.5


def test_an_energy_that_raises_at_every_start_raises_its_own_error() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        sample(HMC(), outside_one, torch.full((3, 1), 2.0), 5)
    with pytest.raises(ValueError, match="not finite at the start of 1 of the chains"):
        sample(HMC(), outside_one, torch.tensor([[0.0], [2.0]]), 5)


def test_stuck_chains_are_told_of_where_sample_was_called(energy: Energy) -> None:
    with pytest.warns(UserWarning, match="^5 of 5 chains did not move in 50 steps") as told:
        sample(HMC(3, 50.0), energy, START, 50)
    assert told[0].filename == __file__


def test_one_draw_says_nothing_of_whether_a_chain_moves() -> None:
    start = torch.zeros(20, 2)
    draws = sample(HMC(1, 1.0), lambda x: 0.5 * x.square().sum(dim=-1), start, 1, thin=300).draws
    assert (draws != 0).any()


@pytest.fixture
def conditioned(random_l2hmc: Callable[..., L2HMC]) -> L2HMC:
    return random_l2hmc(3, 2, observation_dim=2, embedding_hidden=(4,))


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunks_are_the_draws_of_sample(
    conditioned: L2HMC, energy: Energy, chunk_size: int
) -> None:
    options: dict = {"thin": 2, "context": conditioned.embed(torch.randn(5, 2))}
    start = torch.zeros(5, 3)
    torch.manual_seed(1)
    whole = sample(conditioned, energy, start, 7, **options)
    torch.manual_seed(1)
    chunked = sample_chunks(conditioned, energy, start, 7, chunk_size=chunk_size, **options)
    chunks = [chunk for chunk, _ in chunked]
    sizes = [chunk.draws.shape[1] for chunk in chunks]
    assert sum(sizes) == 7
    assert all(size == chunk_size for size in sizes[:-1])
    for field, parts in zip(whole, zip(*chunks, strict=True), strict=True):
        assert torch.equal(field, torch.cat(parts, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [False, True], ids=["global generator", "own generator"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    conditioned: L2HMC, with_extra: Energy, tmp_path: Path, own: bool, dtype: torch.dtype
) -> None:
    kernel = conditioned.to(dtype)
    context = kernel.embed(torch.randn(5, 2, dtype=dtype))
    options: dict = {"chunk_size": 3, "thin": 2, "context": context}
    start = torch.full((5, 3), 0.1, dtype=dtype)
    generator = seeded_generator("cpu", 7) if own else None
    first = sample_chunks(kernel, with_extra, start, 11, generator=generator, **options)
    next(first)
    _, snapshot = next(first)
    torch.save(snapshot, tmp_path / "chains.pt")
    uninterrupted = list(first)
    assert len(uninterrupted) == 2

    loaded = torch.load(tmp_path / "chains.pt", weights_only=True)
    for _ in range(2):  # as often as one likes
        torch.rand(3)  # A snapshot brings the state of its generator.
        resumed = list(sample_chunks(kernel, with_extra, loaded, 5, **options))
        for (chunk, end), (expected, expected_end) in zip(resumed, uninterrupted, strict=True):
            assert all(torch.equal(*pair) for pair in zip(chunk, expected, strict=True))
            assert torch.equal(end["position"], expected_end["position"])
            assert all(map(torch.equal, end["extra"], expected_end["extra"]))
            assert torch.equal(end["extra"][0], end["position"].sum(dim=-1))
            assert torch.equal(end["generator"], expected_end["generator"])


def test_chunks_are_made_one_at_a_time(energy: Energy) -> None:
    counted, start = Counted(energy), torch.zeros(5, 3)
    chunks = sample_chunks(HMC(2, 0.5), counted, start, 1000, chunk_size=4, thin=3)
    assert counted.count == 5
    for done in (1, 2):
        chunk, snapshot = next(chunks)
        assert counted.count == 5 * (1 + done * 4 * 3 * 2)
        assert chunk.draws.untyped_storage().nbytes() == 5 * 4 * 3 * 8
        assert snapshot["position"].untyped_storage().nbytes() == 5 * 3 * 8


def test_no_graph_outlives_a_chunk(random_l2hmc: Callable[..., L2HMC], energy: Energy) -> None:
    with torch.enable_grad():
        for chunk, snapshot in sample_chunks(random_l2hmc(3), energy, torch.zeros(5, 3), 2):
            assert torch.is_grad_enabled()
            assert not any(field.requires_grad for field in chunk)
            assert not snapshot["gradient"].requires_grad


def again(energy: Energy, now: Energy | None = None, **options: Any) -> object:
    """Go on from a snapshot, with what does not go with one."""
    _, snapshot = next(sample_chunks(HMC(), energy, START, 3))
    return sample_chunks(HMC(), now or energy, snapshot, 3, **options)


START = torch.zeros(5, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda energy: HMC(5.0), "num_leapfrogs must be an integer, got 5.0"),
        (lambda energy: sample(HMC(), energy, START, 10.0), "num_draws must be an integer, got 10"),
        (lambda energy: sample(HMC(), energy, START, 10, generator=0), "torch.Generator, got 0"),
        (
            lambda energy: sample(HMC(), torch.distributions.Normal(0.0, 1.0), START, 1),
            "got Normal; DistributionEnergy makes one",
        ),
        (lambda energy: sample(HMC(), energy, START, 0), "must be at least 1, got 0 and 1"),
        (lambda energy: sample(HMC(), energy, START, 3, thin=-2), "at least 1, got 3 and -2"),
        (lambda energy: again(energy, chunk_size=0), "chunk_size must be at least 1, got 0"),
        (lambda energy: again(energy, generator=torch.Generator()), "brings its own generator"),
        (lambda energy: again(energy, now=lambda x: 1.1 * energy(x) + 0.1), "is of another energy"),
        (lambda energy: again(lambda x: energy(x) + 2e5, lambda x: energy(x + 0.1) + 2e5), "is of"),
    ],
)
def test_arguments_that_cannot_be_are_refused_at_once(
    energy: Energy, misuse: Callable[[Energy], object], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        misuse(energy)
