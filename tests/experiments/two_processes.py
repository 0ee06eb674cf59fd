"""Train with experiments.mnist and keep what each process trained on and ended with.

The first argument is the folder for it, the rest are those of experiments.mnist.
"""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dglm import DGLM
from experiments.command import run_command
from experiments.mnist import main

torch.set_num_threads(1)
kept = Path(sys.argv[1])
rank = os.environ.get("LOCAL_RANK", "0")
batches: list[Tensor] = []
training_step = DGLM.training_step


def keep(module: LightningModule, name: str) -> None:
    state = {key: value.clone() for key, value in module.state_dict().items()}
    torch.save({"state": state, "batches": batches}, kept / f"{name}-{rank}.pt")


def recording_step(self: DGLM, x: Tensor, index: int) -> Tensor:
    batches.append(x.clone())
    return training_step(self, x, index)


DGLM.on_train_start = lambda self: keep(self, "start")  # type: ignore[method-assign]
DGLM.on_train_end = lambda self: keep(self, "end")  # type: ignore[method-assign]
DGLM.training_step = recording_step  # type: ignore[method-assign]

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[2:]))
