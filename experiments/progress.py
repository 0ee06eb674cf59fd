"""Progress bars with the time left."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_STATUS_EVERY = 10


def progress_columns() -> Progress:
    """Return an empty bar in the style of all commands."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )


@contextmanager
def counted(description: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar of ``total`` units; yield the function that advances it."""
    with progress_columns() as progress:
        progress.disable = quiet
        task = progress.add_task(description, total=total, status="")
        yield lambda amount: progress.update(task, advance=amount)


class TrainingProgress(Callback):
    """One bar over all updates of a training, however many epochs they take.

    Lightning's own bar starts anew each epoch, so that it cannot tell when training ends.
    """

    def __init__(self) -> None:
        self.progress = progress_columns()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar, from the step where training starts."""
        if trainer.is_global_zero:
            self.progress.start()
            total = trainer.estimated_stepping_batches
            self.task = self.progress.add_task(
                "training",
                total=total if math.isfinite(total) else None,
                completed=trainer.global_step,
                status="",
            )

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Advance the bar by one update."""
        if not trainer.is_global_zero:
            return
        status = ""
        if trainer.global_step % _STATUS_EVERY == 0:
            metrics = trainer.progress_bar_metrics
            named = {name.split("/")[-1]: value for name, value in metrics.items()}
            status = " ".join(f"{name} {value:.3g}" for name, value in named.items())
            self.progress.update(self.task, status=status)
        self.progress.update(self.task, completed=trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the bar off the terminal."""
        self.progress.stop()

    def on_exception(self, *arguments: Any) -> None:
        """Take the bar off the terminal after an error, which skips the teardown."""
        self.progress.stop()
