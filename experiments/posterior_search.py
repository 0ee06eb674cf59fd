"""Search test images for the posterior that is most skewed along its first principal axis."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dglm import DGLM, ChainMeans, PrincipalAxes
from samplers import HMC, Moments, adapt, sample, seeded_generator

NUM_CHAINS, NUM_STEPS = 16, 400
_IMAGES_AT_ONCE = 100
_ERRORS = 5
_STREAM = 0x736561726368


class Search(NamedTuple):
    """What the search has found: estimates from few draws, which long chains must confirm."""

    skewness: Tensor
    """Of each image's posterior along its first principal axis, (image,)."""
    standard_error: Tensor
    """From the spread between 16 chains, (image,)."""

    @property
    def image(self) -> int:
        """The image whose skewness is surest not to be zero."""
        return int((self.skewness / self.standard_error).abs().argmax())

    @property
    def num_skewed(self) -> int:
        """How many images are skewed by more than five standard errors."""
        return int((self.skewness.abs() > _ERRORS * self.standard_error).sum())


@torch.no_grad()
def search_skewed(
    dglm: DGLM, images: Tensor, seed: int, progress: Callable[[int], object]
) -> Search:
    """Estimate the skewness of each image's posterior by 16 chains of 400 steps of HMC.

    Axes come from the first half of the draws, skewness from the second half.

    Arguments:
        dglm: The model; its kernel plays no part.
        images: Observations, (B, N).
        seed: Of all randomness.
        progress: Called with the number of images searched since the last call.
    """
    found = []
    for part, some in enumerate(images.split(_IMAGES_AT_ONCE)):
        generator = seeded_generator(images.device, seed, _STREAM, part)
        rows = some.repeat_interleave(NUM_CHAINS, dim=0)
        energy = dglm.model.energy(rows)
        start = dglm.posterior_samples(rows, 0, generator)
        kernel, start = adapt(HMC().to(rows.device), energy, start, NUM_STEPS, generator=generator)
        draws = sample(kernel, energy, start, NUM_STEPS, generator=generator).draws
        for chains in draws.view(len(some), NUM_CHAINS, NUM_STEPS, -1):
            axes = PrincipalAxes.of(Moments.of(chains[:, : NUM_STEPS // 2].flatten(0, 1)))
            found.append(ChainMeans.of(axes, chains[:, NUM_STEPS // 2 :]).skewness())
        progress(len(some))
    skewness, error = zip(*found, strict=True)
    return Search(torch.stack(skewness), torch.stack(error))
