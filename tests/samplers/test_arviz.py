"""Chains go to ArviZ in one line."""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from samplers import HMC, Chains, sample, seeded_generator


@pytest.fixture
def chains() -> Chains:
    kernel, start = HMC(num_leapfrogs=5, step_size=0.5), torch.zeros(4, 3)
    generator = seeded_generator("cpu", 0)
    return sample(kernel, lambda x: 0.5 * x.square().sum(1), start, 200, generator=generator)


def test_both_spellings_of_arviz_take_the_chains(
    chains: Chains, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before ArviZ 1 its groups were keywords; on Python 3.11 there is no ArviZ 1."""
    spellings: tuple[Callable[..., dict], ...] = (
        lambda data, *, name=None: data,
        lambda posterior=None, *, sample_stats=None, prior=None: {
            "posterior": posterior,
            "sample_stats": sample_stats,
        },
    )
    for from_dict in spellings:
        arviz = SimpleNamespace(from_dict=from_dict)
        monkeypatch.setitem(sys.modules, "arviz", arviz)
        data = chains.to_arviz()
        assert np.array_equal(data["posterior"]["position"], chains.draws.numpy())
        expected = {
            "lp": -chains.energy,
            "acceptance_rate": chains.acceptance,
            "diverging": chains.diverging,
        }
        assert set(data["sample_stats"]) == set(expected)
        for name, field in expected.items():
            assert data["sample_stats"][name].dtype == field.numpy().dtype
            assert np.array_equal(data["sample_stats"][name], field.numpy())


def test_from_dict_takes_an_export(chains: Chains) -> None:
    arviz_base = pytest.importorskip("arviz_base")
    data = arviz_base.from_dict(chains.export())
    position, statistics = data["posterior"]["position"], data["sample_stats"]
    assert position.dims[:2] == ("chain", "draw")
    assert np.array_equal(position.values, chains.draws.numpy())
    assert set(statistics.data_vars) == {"lp", "acceptance_rate", "diverging"}
    assert np.array_equal(statistics["lp"].values, -chains.energy.numpy())
