from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from samplers import HMC, L2HMC, Energy, State, sample, sample_chunks, seeded_generator


@pytest.fixture
def kernel() -> HMC:
    return HMC(num_leapfrogs=2, step_size=0.8)


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
    conditioned: L2HMC, energy: Energy, tmp_path: Path, own: bool, dtype: torch.dtype
) -> None:
    kernel = conditioned.to(dtype)
    context = kernel.embed(torch.randn(5, 2, dtype=dtype))
    options: dict = {"chunk_size": 3, "thin": 2, "context": context}
    start = torch.full((5, 3), 0.1, dtype=dtype)
    generator = seeded_generator("cpu", 7) if own else None
    first = sample_chunks(kernel, energy, start, 11, generator=generator, **options)
    next(first)
    _, snapshot = next(first)
    torch.save(snapshot, tmp_path / "chains.pt")
    uninterrupted = list(first)

    loaded = torch.load(tmp_path / "chains.pt", weights_only=True)
    torch.rand(3)  # A snapshot brings the state of its generator.
    resumed = list(sample_chunks(kernel, energy, loaded, 5, **options))
    assert len(resumed) == len(uninterrupted) == 2
    for (chunk, end), (expected, expected_end) in zip(resumed, uninterrupted, strict=True):
        assert all(torch.equal(*pair) for pair in zip(chunk, expected, strict=True))
        assert torch.equal(end["position"], expected_end["position"])
        assert torch.equal(end["generator"], expected_end["generator"])


def test_a_snapshot_can_be_resumed_twice(kernel: HMC, energy: Energy) -> None:
    _, snapshot = next(sample_chunks(kernel, energy, torch.zeros(5, 3), 4))
    again = [next(sample_chunks(kernel, energy, snapshot, 3))[0].draws for _ in range(2)]
    assert torch.equal(*again)


def test_what_an_energy_keeps_is_in_the_snapshot(kernel: HMC) -> None:
    class Tempered:
        def value_and_gradient(self, position: Tensor) -> State:
            prior = position.square().sum(dim=-1)
            return State(position, 0.5 * prior, position, (prior,))

    first = sample_chunks(kernel, Tempered(), torch.zeros(5, 3), 6, chunk_size=3)
    _, snapshot = next(first)
    torch.testing.assert_close(snapshot["extra"][0], snapshot["position"].square().sum(dim=-1))
    expected, _ = next(first)
    resumed, _ = next(sample_chunks(kernel, Tempered(), snapshot, 3))
    assert torch.equal(resumed.draws, expected.draws)


def test_chunks_are_made_one_at_a_time(energy: Callable[[Tensor], Tensor]) -> None:
    calls = 0

    def counted(position: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return energy(position)

    chunks = sample_chunks(HMC(2, 0.5), counted, torch.zeros(5, 3), 1000, chunk_size=4, thin=3)
    assert calls == 1
    for done in (1, 2):
        chunk, snapshot = next(chunks)
        assert calls == 1 + done * 4 * 3 * 2
        assert chunk.draws.untyped_storage().nbytes() == 5 * 4 * 3 * 8
        assert snapshot["position"].untyped_storage().nbytes() == 5 * 3 * 8


def test_no_graph_outlives_a_chunk(random_l2hmc: Callable[..., L2HMC], energy: Energy) -> None:
    with torch.enable_grad():
        for chunk, snapshot in sample_chunks(random_l2hmc(3), energy, torch.zeros(5, 3), 2):
            assert torch.is_grad_enabled()
            assert not any(field.requires_grad for field in chunk)
            assert not snapshot["gradient"].requires_grad


def test_chunks_refuse_at_once(kernel: HMC, energy: Energy) -> None:
    start = torch.zeros(5, 3)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        sample_chunks(kernel, energy, start, 3, chunk_size=0)
    with pytest.raises(ValueError, match="num_draws and thin must be at least 1, got 0 and 1"):
        sample_chunks(kernel, energy, start, 0)
    _, snapshot = next(sample_chunks(kernel, energy, start, 3))
    with pytest.raises(ValueError, match="snapshot brings its own generator"):
        sample_chunks(kernel, energy, snapshot, 3, generator=seeded_generator("cpu", 0))
