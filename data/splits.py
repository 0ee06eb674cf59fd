"""What is fixed once and for all: which images are validated on, and how images are binarized.

Both come from NumPy's ``RandomState``, whose streams are frozen, so that neither a new release of
PyTorch nor another device changes what a held-out score means.
"""

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 0
"""Seed of the train and validation split, and of the split of mnist-5k."""
BINARIZATION_SEED = 1
"""Seed of the one binarization that held-out scores refer to."""

_LEVELS = 255


def stratified_order(labels: Tensor) -> Tensor:
    """Return a fixed order of the images in which the classes take turns.

    Each class is shuffled with :data:`SPLIT_SEED` and spread evenly over the order, so that any
    run of consecutive places has the classes in their overall proportions. A function of the
    labels alone.

    Arguments:
        labels: The classes, (N,).

    Returns:
        A permutation of 0 ... N - 1, (N,), int64.
    """
    classes = labels.numpy()
    random = np.random.RandomState(SPLIT_SEED)
    place = np.empty(len(classes))
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        place[random.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    return torch.from_numpy(np.argsort(place, kind="stable"))


def split_validation(labels: Tensor, validation: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the training and of the validation images, each ascending.

    Arguments:
        labels: The classes of all images outside the test set, (N,).
        validation: How many of them are for validation, from 0 to N - 1.
    """
    order = stratified_order(labels)
    training = len(order) - validation
    return order[:training].sort().values, order[training:].sort().values


def binarize_fixed(images: Tensor, stream: int) -> Tensor:
    """Draw the fixed binarization, each pixel 1 with probability its grey level / 255.

    The draw of an image depends on its row in the file and on nothing else.

    Arguments:
        images: All images of a file, (N, D), uint8 or from 0 to 1.
        stream: Which file, so that two files do not share their random numbers.

    Returns:
        Zeros and ones, (N, D), uint8.
    """
    random = np.random.RandomState((BINARIZATION_SEED, stream))
    if images.dtype != torch.uint8:
        uniform = torch.from_numpy(random.random_sample(tuple(images.shape)))
        return (uniform < images).to(torch.uint8)
    # Uniform over 0 ... 254, so that level k is exceeded with probability exactly k / 255.
    threshold = random.randint(0, _LEVELS, size=tuple(images.shape), dtype=np.uint8)
    return (torch.from_numpy(threshold) < images).to(torch.uint8)


def binarize(images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a fresh binarization on the device of ``images`` and ``generator``.

    Arguments:
        images: Grey levels, (B, D), uint8 or from 0 to 1.
        generator: The source of the random numbers.

    Returns:
        Zeros and ones, (B, D), floating-point.
    """
    shape, device = images.shape, images.device
    if images.dtype != torch.uint8:
        uniform = torch.rand(shape, generator=generator, dtype=images.dtype, device=device)
        return (uniform < images).to(images.dtype)
    # As in binarize_fixed; a quarter of the time of torch.bernoulli.
    threshold = torch.randint(_LEVELS, shape, generator=generator, dtype=torch.uint8, device=device)
    return (threshold < images).float()
