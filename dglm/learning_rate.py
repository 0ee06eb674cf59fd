"""The schedule of the learning rate."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_LAST = 0.03
"""What is left of the learning rate in the end."""


def falling_learning_rate(optimizer: Optimizer, updates: float, share: float) -> LambdaLR:
    """Return a schedule in which the last part of a training has a falling learning rate.

    It falls geometrically, to 3 % at the end.

    Arguments:
        optimizer: Whose learning rate it is.
        updates: Of the whole training.
        share: That of the last part, in (0, 1].

    Raises:
        ValueError: The training has no end.
    """
    if not math.isfinite(updates):
        raise ValueError("decay_share needs the training's length: set max_epochs or max_steps")
    begin = 1 - share

    def factor(done: int) -> float:
        return _LAST ** max(0.0, (done / updates - begin) / share)

    return LambdaLR(optimizer, factor)
