"""Which classes images look like, by a small classifier, and how chains move among them."""

import warnings
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from data import ImageDataModule
from experiments.scoring import mean_and_error


class Classifier(NamedTuple):
    """A classifier of binary images and its share of correct answers on test images."""

    network: MLPClassifier
    accuracy: float
    standard_error: float

    def classify(self, images: Tensor) -> Tensor:
        """Return the class of each image (…, D), (…,), on the CPU."""
        found = self.network.predict(images.flatten(0, -2).cpu().numpy())
        return torch.from_numpy(found).view(images.shape[:-1])


def train_classifier(data: ImageDataModule, seed: int) -> Classifier:
    """Train a network of one hidden layer on the binarized training images and their labels."""
    network = MLPClassifier((128,), early_stopping=True, n_iter_no_change=5, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the accuracy tells enough
        network.fit(data.heldout("train").numpy(), data.labels("train").numpy())
    untested = Classifier(network, torch.nan, torch.nan)
    right = untested.classify(data.heldout("test")) == data.labels("test")
    return Classifier(network, *mean_and_error(right))


def movement(classes: Tensor) -> dict[str, Tensor]:
    """Count how chains move among classes, from those at each sweep, (sweeps, chain).

    Returns:
        For each chain the number of distinct classes; their effective number, the exponential of
        the entropy of their frequencies, to which a rare mistake of the classifier adds little;
        and the switches from class to class per 100 sweeps. (chain,) each.

    Raises:
        ValueError: There is only one sweep.
    """
    if len(classes) < 2:
        raise ValueError(f"switches of class take at least 2 sweeps, got {len(classes)}")
    shares = torch.nn.functional.one_hot(classes).double().mean(dim=0)
    return {
        "classes": (shares > 0).sum(dim=-1).double(),
        "effective_classes": torch.special.entr(shares).sum(dim=-1).exp(),
        "switches": 100 * (classes.diff(dim=0) != 0).double().mean(dim=0),
    }


def class_frequencies(classes: Tensor, num_images: int, num_classes: int) -> Tensor:
    """Return how often each class occurs at (sweeps, image · chain), (image, class)."""
    found = torch.nn.functional.one_hot(classes, num_classes).double().mean(dim=0)
    return found.view(num_images, -1, num_classes).mean(dim=1)


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    """Return half the sum of the differences of frequencies (…, class), from 0 to 1, (…,)."""
    return 0.5 * (first - second).abs().sum(dim=-1)
