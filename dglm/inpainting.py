"""Inpainting by block Gibbs: latent variables given the image, hidden pixels given those."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dglm.gaussian import DiagonalGaussian
from dglm.model import GenerativeModel
from dglm.precision import full_precision
from samplers import Kernel
from samplers.random import standard_normal


class KernelSteps(NamedTuple):
    """A kernel that draws z given the image by so many Metropolis-Hastings steps a sweep."""

    kernel: Kernel
    """HMC, or L2HMC with the embedding of its images."""
    steps: int
    """Steps a sweep, at least 1."""


@full_precision()
@torch.no_grad()
def inpaint(
    model: GenerativeModel,
    images: Tensor,
    given: Tensor,
    sweeps: int,
    posterior: nn.Module | KernelSteps | tuple[Kernel, int],
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    observe: Callable[[Tensor, Tensor], object] = lambda x, z: None,
) -> Tensor:
    r"""Fill in the hidden pixels by alternating z given x and hidden pixels given z.

    .. math:: z_t \sim p(z | x_{t - 1}), \quad x_t^\text{hidden} \sim p(x^\text{hidden} | z_t)

    With an encoder, z is drawn anew from q(z|x) at each sweep, which is biased as q is. With a
    kernel, z persists from sweep to sweep, so that the chain leaves p(z, hidden | given) invariant.

    Arguments:
        model: p(x, z).
        images: Observations, (N, D); their hidden pixels are where the chain starts.
        given: True where a pixel is given, boolean, (D,) or (N, D).
        sweeps: Sweeps to make.
        posterior: An encoder, or (kernel, steps per sweep).
        start: The first z of a kernel, (N, latent_dim), for example a draw of q(z|x); without it,
            a draw from the prior. An encoder needs none.
        generator: Of all randomness; without one, torch's global generator.
        observe: Called after each sweep with the images (N, D) and the z (N, latent_dim) that
            their hidden pixels were drawn from.

    Returns:
        The images after each sweep, (sweeps, N, D); given pixels are as they were.

    Raises:
        ValueError: A count is below 1, or images, mask or start have the wrong shape, type or
            range.

    References:
        Levy, Hoffman and Sohl-Dickstein (2018), Section 5.2.2; see :class:`samplers.L2HMC`.

    Example:
        >>> import torch
        >>> from dglm import GenerativeModel, inpaint
        >>> from samplers import HMC
        >>> model = GenerativeModel(torch.nn.Linear(2, 6), latent_dim=2)
        >>> images, z = model.sample(3)
        >>> given = torch.arange(6) < 3
        >>> inpaint(model, images, given, sweeps=4, posterior=(HMC(), 2), start=z).shape
        torch.Size([4, 3, 6])
    """
    images = model.observations(images)
    _check_mask(given, images)
    if sweeps < 1:
        raise ValueError(f"sweeps must be at least 1, got {sweeps}")
    if isinstance(posterior, Kernel):
        raise ValueError("a kernel needs a number of steps: pass posterior=(kernel, steps a sweep)")
    z = images.new_empty(0)
    if not isinstance(posterior, nn.Module):
        posterior = KernelSteps(*posterior)
        if posterior.steps < 1:
            raise ValueError(f"the kernel needs at least 1 step a sweep, got {posterior.steps}")
        z = _first(model, images, start, generator)
    x, frames = images, []
    for _ in range(sweeps):
        if isinstance(posterior, nn.Module):
            z = DiagonalGaussian(*posterior(x)).sample(generator)
        else:
            z = _move(posterior, model, x, z, generator)
        filled = model.likelihood.sample(model.decoder(z), generator)
        x = torch.where(given, images, filled)
        frames.append(x)
        observe(x, z)
    return torch.stack(frames)


def _first(
    model: GenerativeModel,
    images: Tensor,
    start: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the z that a kernel starts from."""
    shape = len(images), model.latent_dim
    if start is None:
        return standard_normal(images.new_empty(shape), generator)
    if start.shape != shape:
        raise ValueError(f"start must be a z for each image, {shape}, got {tuple(start.shape)}")
    return start


def _move(
    posterior: KernelSteps,
    model: GenerativeModel,
    x: Tensor,
    z: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Take the kernel's steps for p(z|x); the energy is another at each sweep, so start afresh."""
    kernel, energy = posterior.kernel, model.energy(x)
    context, state = kernel.embed(x), kernel.init(z, energy)
    for _ in range(posterior.steps):
        state, _ = kernel.step(state, energy, kernel.noise(state, generator), context)
    return state.position


def _check_mask(given: Tensor, images: Tensor) -> None:
    if given.dtype != torch.bool:
        raise ValueError(f"the mask of given pixels must be boolean, got {given.dtype}")
    if given.shape not in (images.shape[1:], images.shape):
        raise ValueError(
            f"the mask of given pixels must have shape {tuple(images.shape[1:])} or "
            f"{tuple(images.shape)}, got {tuple(given.shape)}"
        )
