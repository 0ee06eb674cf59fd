"""Callbacks that keep training sound: no non-finite update, divergences counted, kernels exact."""

from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from dglm.precision import full_precision
from samplers import seeded_generator

if TYPE_CHECKING:
    from dglm.module import DGLM

DIVERGENCE_BOUND = 0.01
"""Share of diverged transitions beyond which a run is warned about."""
PATIENCE = 10
"""So many updates in a row that had to be skipped end the run."""

_LOOK_EVERY = 10
_WARN_FROM = 100

EXACTNESS_BOUND = 0.01
"""Bound on both errors. A log-determinant wrong by 0.01 nats makes an acceptance probability wrong
by 1 %, and a point missed by 0.01 posterior standard deviations blurs the posterior about as much:
what is reported here has error bars of that size. A sound kernel is at 1e-6 in float32."""

_WATCH_EVERY = 100
_WATCHED_IMAGES = 32


class TrainingFailed(RuntimeError):  # noqa: N818 (it is what happened)
    """Training cannot go on: one update after the other is not finite."""


class Safeguard(Callback):
    """Skips updates whose loss or gradient is not finite, and counts them and the divergences.

    A skipped update leaves the weights and Adam's moments as they were, in all processes alike;
    after :data:`PATIENCE` in a row nothing is updated any more and the run ends. All of it is
    computed on the device, which the host waits for once in ten updates only; with an optimizer
    that is not fused, at each.

    Raises:
        TrainingFailed: :data:`PATIENCE` updates in a row were skipped.
    """

    _recent: Tensor  # updates, skipped ones and diverged shares since the last look, (3,)
    _in_a_row: Tensor  # skipped ones, 0-d
    _broken_loss: Tensor  # losses of the present update that are not finite, 0-d
    _diverging: Tensor  # sum over the batches of the present update of diverged shares, 0-d
    _batches: int  # of the present update

    def __init__(self) -> None:
        self.updates = 0
        """Optimizer steps so far, over all of a resumed run."""
        self.skipped = 0
        """How many of them were skipped."""
        self._diverged = 0.0  # sum over the updates of the share of diverged transitions
        self._warned = False
        self._reset(torch.device("cpu"))

    @property
    def divergence(self) -> float:
        """Share of the transitions of training that diverged."""
        return self._diverged / max(self.updates, 1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting on the device; a run that is resumed has its patience back."""
        self._reset(pl_module.device)

    def note_divergence(self, diverging: Tensor) -> None:
        """Take down the share of diverged transitions of each chain of a training step, (B,).

        Rather than the logged metric, which Lightning waits for.
        """
        self._diverging = self._diverging + diverging.mean()
        self._batches += 1

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Look at the loss, or at those of the batches that one update accumulates."""
        self._broken_loss += ~loss.detach().isfinite()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Tell the optimizer to skip an update that is not finite."""
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        finite = torch.nn.utils.get_total_norm(gradients).isfinite()
        broken = self._broken_loss + ~finite
        # The last update of an epoch may have fewer batches than the others.
        diverging = (self._diverging / max(self._batches, 1)).to(broken)
        broken, diverging = trainer.strategy.reduce(
            torch.stack([broken, diverging]), reduce_op="mean"
        )
        skip = (broken > 0) | (self._in_a_row >= PATIENCE)
        self._in_a_row = torch.where(skip, self._in_a_row + 1, 0.0)
        self._recent += torch.stack([torch.ones_like(diverging), skip.to(diverging), diverging])
        self._broken_loss.zero_()
        self._diverging, self._batches = torch.zeros_like(diverging), 0
        if optimizer.defaults.get("fused"):
            # How gradient scalers tell it, which then changes nothing on the device.
            optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        elif skip:  # an optimizer of the user's own: it leaves alone what has no gradient
            optimizer.zero_grad()

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Look at the counts once in ten updates."""
        if trainer.global_step % _LOOK_EVERY == 0:
            self._look()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what happened since the last look, and tell of updates that were skipped."""
        self._collect()
        if self.skipped:
            rank_zero_warn(skipped_warning(self.skipped, self.updates))

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for checkpoints."""
        self._collect()
        return {"updates": self.updates, "skipped": self.skipped, "diverged": self._diverged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.updates, self.skipped = state_dict["updates"], state_dict["skipped"]
        self._diverged = state_dict["diverged"]

    def _reset(self, device: torch.device) -> None:
        self._recent = torch.zeros(3, device=device)
        self._in_a_row = torch.zeros((), device=device)
        self._broken_loss = torch.zeros((), device=device)
        self._diverging = torch.zeros((), device=device)
        self._batches = 0

    def _look(self) -> None:
        updates, _, diverged = self._collect()
        if self._in_a_row >= PATIENCE:
            raise TrainingFailed(
                f"the loss or its gradient was not finite in {int(self._in_a_row)} updates in a "
                "row, which were skipped; start again with a lower learning rate or step size"
            )
        # The recent ones: untrained encoders and decoders move far in their first ten updates.
        share = diverged / max(updates, 1)
        if self.updates >= _WARN_FROM and share > DIVERGENCE_BOUND and not self._warned:
            rank_zero_warn(divergence_warning(share))
            self._warned = True

    def _collect(self) -> list[float]:
        recent = updates, skipped, diverged = self._recent.tolist()
        self.updates += int(updates)
        self.skipped += int(skipped)
        self._diverged += diverged
        self._recent.zero_()
        return recent


def skipped_warning(skipped: int, updates: int) -> str:
    """Return what to tell of skipped updates, and what to try."""
    return (
        f"{skipped} of {updates} updates were skipped, as their loss or gradient was not finite: "
        "try a lower learning rate"
    )


def divergence_warning(share: float) -> str:
    """Return what to tell of a share of diverged transitions above the bound, and what to try."""
    return (
        f"{share:.1%} of the kernel's transitions diverged, more than {DIVERGENCE_BOUND:.0%}: "
        "try a smaller step size, fewer leapfrogs or a lower learning rate"
    )


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
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *rest: int
    ) -> None:
        """Measure where it is time to."""
        module = cast("DGLM", pl_module)
        if module.kernel is None or trainer.global_step % _WATCH_EVERY:
            return
        x = module.model.observations(batch)[:_WATCHED_IMAGES]
        errors = exactness_errors(module, x, trainer.global_step)
        errors = trainer.strategy.reduce(errors, reduce_op="max")
        module.log("train/round_trip_error", errors[0])
        module.log("train/log_det_error", errors[1])
        if not (self._warned or float(errors.max()) <= EXACTNESS_BOUND):  # NaN, too
            rank_zero_warn(exactness_warning(*errors.tolist()))
            self._warned = True


@full_precision()
@torch.no_grad()
def exactness_errors(module: "DGLM", x: Tensor, step: int) -> Tensor:
    """Return the round-trip and the log-determinant error on images (B, N), (2,)."""
    if module.kernel is None:
        raise ValueError("a VAE has no kernel whose exactness could be measured")
    kernel = module.kernel
    generator = seeded_generator(x.device, module.seed, "reversibility", step, module.global_rank)
    q, energy, context = module.posterior(x), module.model.energy(x), kernel.embed(x)
    state = kernel.init(q.sample(generator), energy)
    noise = kernel.noise(state, generator)
    accepted = kernel.step(state, energy, noise, context)[1].accepted
    trip = kernel.round_trip(state.position, energy, noise, context)
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
