"""The classes of images that are filled in, by block Gibbs and as the posterior has them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dglm import DGLM, KernelSteps, inpaint
from experiments.classes import Classifier
from samplers import HMC, adapt, sample, seeded_generator

_STREAM, _REFERENCE_STREAM = 0x66696C6C, 0x6D617267696E616C
_REFERENCE_LEAPFROGS, _REFERENCE_WARM_UP, _REFERENCE_THIN = 10, 300, 5


class InpaintingTask(NamedTuple):
    """Images with hidden pixels, and how many chains fill each in."""

    dglm: DGLM
    images: Tensor
    """(N, D)."""
    given: Tensor
    """True where a pixel is given, boolean, (D,)."""
    classifier: Classifier
    num_chains: int
    sweeps: int
    seed: int

    @property
    def rows(self) -> Tensor:
        """The image of each chain, (N · chain, D), those of an image side by side."""
        return self.images.repeat_interleave(self.num_chains, dim=0)

    def classes(self, z: Tensor) -> Tensor:
        """Return the classes of the images with p(x|z) in place of their hidden pixels, (B,)."""
        mean = self.dglm.model.likelihood.mean(self.dglm.model.decoder(z))
        return self.classifier.classify(torch.where(self.given, self.rows, mean))


@torch.no_grad()
def fill_in(
    hidden: InpaintingTask, posterior: nn.Module | KernelSteps, progress: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    """Run block Gibbs from draws of q(z|x) of the whole images.

    Returns:
        The classes at each sweep, (sweeps, N · chain), and the images, (sweeps, N · chain, D).
    """
    generator = seeded_generator(hidden.images.device, hidden.seed, _STREAM)
    rows, classes = hidden.rows, []
    start = hidden.dglm.posterior_samples(rows, 0, generator)

    def observe(x: Tensor, z: Tensor) -> None:
        classes.append(hidden.classes(z))
        progress(1)

    frames = inpaint(
        hidden.dglm.model,
        rows,
        hidden.given,
        hidden.sweeps,
        posterior,
        start,
        generator,
        observe,
    )
    return torch.stack(classes), frames


def reference_gradients(hidden: InpaintingTask) -> int:
    """Return the gradients of U that :func:`posterior_classes` takes."""
    steps = _REFERENCE_WARM_UP + _REFERENCE_THIN * hidden.sweeps
    return len(hidden.images) * hidden.num_chains * (2 + steps * _REFERENCE_LEAPFROGS)


@torch.no_grad()
def posterior_classes(hidden: InpaintingTask, progress: Callable[[int], object]) -> Tensor:
    """Return the classes of draws of p(z | given pixels), (sweeps, N · chain).

    By tuned HMC from draws of the prior, the hidden pixels integrated out: nothing is shared with
    the chains that it is a reference for, and no filled-in pixels hold z where it is.
    """
    done = 0

    def count(draws: int) -> None:
        nonlocal done
        progress(draws - done)
        done = draws

    generator = seeded_generator(hidden.images.device, hidden.seed, _REFERENCE_STREAM)
    model = hidden.dglm.model
    energy = model.marginal(hidden.given).energy(hidden.rows[:, hidden.given])
    start = model.sample(len(hidden.rows), generator)[1]
    kernel = HMC(_REFERENCE_LEAPFROGS).to(start)
    warm = adapt(kernel, energy, start, _REFERENCE_WARM_UP, generator=generator)
    chains = sample(
        warm.kernel,
        energy,
        warm.position,
        hidden.sweeps,
        thin=_REFERENCE_THIN,
        generator=generator,
        progress=count,
    )
    return torch.stack([hidden.classes(z.to(start)) for z in chains.draws.unbind(dim=1)])
