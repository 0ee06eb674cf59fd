"""The search for a skewed posterior among those of several images."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dglm import DGLM, GenerativeModel, principal_axes
from experiments.posterior import Posterior, run_chains, search_skewed, warn_of_missed_modes
from samplers import HMC


class Weights(nn.Module):
    """Logits 3 z₀ of two pixels and 6 z₁ of two more, so that z₀ is the wider posterior."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([3.0, 3.0, 6.0, 6.0]))

    def forward(self, z: Tensor) -> Tensor:
        return self.weights * z[:, [0, 0, 1, 1]]


class Wide(nn.Module):
    """q(z|x) = N(0, I)."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zero = self.zero * x[:, :2]
        return zero, zero


def test_the_skewed_one_is_found() -> None:
    # One of two pixels on: the posterior is symmetric. Both: nearly the half of a Gaussian.
    dglm = DGLM(GenerativeModel(Weights(), 2), Wide())
    symmetric = torch.tensor([1.0, 0.0, 1.0, 0.0])
    skewed = torch.tensor([1.0, 1.0, 1.0, 0.0])
    counts: list[int] = []
    images = torch.stack([symmetric, symmetric, skewed, symmetric])
    search = search_skewed(dglm, images, 0, counts.append)
    assert sum(counts) == 4
    assert search.image == 2
    assert search.num_skewed == 1


def test_chains_are_warmed_up_and_those_of_hmc_jittered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares, noise = [], HMC.noise

    def watched(kernel: HMC, *given: Any) -> Any:
        drawn = noise(kernel, *given)
        if kernel.num_leapfrogs == 5:  # those of settling chains have steps of their own
            shares.append(drawn.direction.abs())
        return drawn

    warmed = []
    monkeypatch.setattr(HMC, "noise", watched)
    monkeypatch.setattr(
        "experiments.posterior.principal_axes",
        lambda *given: warmed.append(given[3]) or principal_axes(*given),
    )
    dglm, image = DGLM(GenerativeModel(Weights(), 2), Wide()), torch.ones(4)
    options = Posterior(checkpoint="", num_chains=10, num_steps=4, num_warmup=40, quiet=True)
    run_chains(dglm, image, options, tmp_path / "posterior.png")
    assert warmed == [40]
    search_skewed(dglm, image[None], 0, lambda count: None)
    assert all(((drawn > 0.5) & (drawn < 1)).any() for drawn in shares)


class Even(Weights):
    """Logits that are the same at z and -z."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(4 * z.abs() - 4)


class Aside(Wide):
    """q(z|x) = N(1, 0.01 I)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, _ = super().forward(x)
        return mean + 1, mean - 2.3


def test_modes_where_no_chain_would_start_are_told_of() -> None:
    image = torch.tensor([1.0, 0.0, 1.0, 0.0])
    with pytest.warns(UserWarning, match="q.z.x., which misses a mode of this posterior"):
        warn_of_missed_modes(DGLM(GenerativeModel(Even(), 2), Aside()), image, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_missed_modes(DGLM(GenerativeModel(Weights(), 2), Wide()), image, 0)
