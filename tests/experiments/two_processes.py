"""Train with experiments.mnist and keep what each process trained on and ended with.

The first argument is the folder for it, the rest are those of experiments.mnist.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dglm import DGLM
from dglm.chain import long_chain_log_joint
from experiments import report
from experiments.mnist import main
from experiments.shared.cli import run_command


class Recorder:
    """Keeps the batches of this process, and its weights at the start and at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches: list[Tensor] = []

    def keep(self, module: LightningModule, name: str) -> None:
        state = {key: value.clone() for key, value in module.state_dict().items()}
        rank = os.environ.get("LOCAL_RANK", "0")
        torch.save({"state": state, "batches": self.batches}, self.folder / f"{name}-{rank}.pt")

    def attach(self) -> None:
        training_step = DGLM.training_step

        def recording_step(module: DGLM, x: Tensor, index: int) -> Tensor:
            self.batches.append(x.clone())
            return training_step(module, x, index)

        DGLM.on_train_start = lambda module: self.keep(module, "start")  # type: ignore[method-assign]
        DGLM.on_train_end = lambda module: self.keep(module, "end")  # type: ignore[method-assign]
        DGLM.training_step = recording_step  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    report.long_chain_log_joint = partial(long_chain_log_joint, num_steps=20)
    report.draw = lambda *arguments: None  # type: ignore[assignment]
    Recorder(Path(sys.argv[1])).attach()
    run_command(lambda: main(sys.argv[2:]))
