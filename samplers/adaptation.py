"""Adaptation of a kernel's step size."""

import torch
from torch import Tensor

from samplers.hmc import HMC

TARGET_ACCEPTANCE = 0.65
"""The acceptance at which HMC moves farthest for its cost in high dimensions."""


@torch.no_grad()
def track_acceptance(
    kernel: HMC, acceptance: Tensor, target: float = TARGET_ACCEPTANCE, gain: float = 0.05
) -> None:
    r"""Move the step size toward a target acceptance, in place.

    .. math:: \log ε ← \log ε + γ (\bar A - A^*)

    The gain γ is constant, because the target distribution of a model in training never settles.
    The draws taken while the step size follows its own chain are not exactly invariant: freeze it
    (stop calling this) before draws that count.

    Arguments:
        kernel: Its ``log_step_size`` changes.
        acceptance: Acceptance probabilities of the last steps, any shape; non-finite ones count 0.
        target: A*, in (0, 1).
        gain: γ.

    References:
        A tutorial on adaptive MCMC (Andrieu and Thoms, 2008), Section 5.1.2.
        The optimal 0.65: Optimal tuning of the hybrid Monte Carlo algorithm (Beskos, Pillai,
        Roberts, Sanz-Serna and Stuart, 2013).
    """
    kernel.log_step_size.add_(acceptance.nan_to_num(0.0, 0.0, 0.0).mean() - target, alpha=gain)
