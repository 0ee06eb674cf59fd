"""Watches over the exactness of a kernel while it is trained."""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from dglm.module import DGLM, Stream
from dglm.precision import full_precision
from samplers import round_trip, seeded_generator

EXACTNESS_BOUND = 0.01
"""Bound on both errors. A log-determinant wrong by 0.01 nats makes an acceptance probability wrong
by 1 %, and a point missed by 0.01 posterior standard deviations blurs the posterior about as much:
what is reported here has error bars of that size. A sound kernel is at 1e-6 in float32."""

_WATCH_EVERY = 100
_WATCHED_IMAGES = 32


class ReversibilityMonitor(Callback):
    """Measures round trips of the kernel on some images once in a hundred updates, and warns.

    The round-trip error is the largest over chains and coordinates, in standard deviations of q for
    the position and of N(0, I) for the momentum; the log-determinant error is the largest sum of
    both ways, in nats. Both in the precision that the chains run in, over the accepted proposals
    alone: a rejected one does no harm.
    """

    def __init__(self) -> None:
        self._warned = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, *rest: int
    ) -> None:
        """Measure where it is time to."""
        module = cast(DGLM, pl_module)
        if module.kernel is None or trainer.global_step % _WATCH_EVERY:
            return
        errors = exactness_errors(module, batch[:_WATCHED_IMAGES], trainer.global_step)
        errors = trainer.strategy.reduce(errors, reduce_op="max")
        module.log("train/round_trip_error", errors[0])
        module.log("train/log_det_error", errors[1])
        if not (self._warned or float(errors.max()) <= EXACTNESS_BOUND):  # NaN, too
            rank_zero_warn(exactness_warning(*errors.tolist()))
            self._warned = True


@full_precision()
@torch.no_grad()
def exactness_errors(module: DGLM, x: Tensor, step: int) -> Tensor:
    """Return the round-trip and the log-determinant error on images (B, N), (2,)."""
    if module.kernel is None:
        raise ValueError("a VAE has no kernel whose exactness could be measured")
    kernel = module.kernel
    generator = seeded_generator(x.device, module.seed, Stream.EXACTNESS, step, module.global_rank)
    q, energy, context = module.posterior(x), module.model.energy(x), kernel.embed(x)
    state = kernel.init(q.sample(generator), energy)
    noise = kernel.noise(state, generator)
    accepted = kernel.step(state, energy, noise, context)[1].accepted
    trip = round_trip(kernel, state.position, energy, noise, context)
    distance = torch.cat([trip.position * (-q.log_std).exp(), trip.momentum], dim=-1)
    errors = torch.stack([distance.abs().amax(dim=-1), trip.log_det.abs()])
    return torch.where(accepted, errors, 0.0).amax(dim=-1)


def exactness_warning(round_trip_error: float, log_det_error: float) -> str:
    """Return what to tell of errors beyond the bound, and what to try."""
    return (
        f"rounding keeps the kernel from being exact: a round trip misses its start by "
        f"{round_trip_error:.2g} standard deviations, the log-determinant is off by "
        f"{log_det_error:.2g} nats (bound {EXACTNESS_BOUND}): try a smaller step size, fewer "
        "leapfrogs or precision 64-true"
    )
