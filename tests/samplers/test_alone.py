"""A kernel is trained, loaded and used where there is no Lightning and no model of images."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import samplers
from samplers import HMC, L2HMC, Flow, Learned, Turns, sample
from samplers.comparison import Comparison

CODE = """
import sys

ABSENT = {"lightning", "pytorch_lightning", "lightning_fabric", "dglm", "data", "experiments"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
import torch
from samplers import L2HMC, Learned, TrainingSettings, sample, train_sampler

assert "torch._inductor" not in sys.modules  # it is for those who compile only

def energy(x):
    return 0.5 * x.square().sum(dim=1)

found = Learned.load(sys.argv[1])
torch.manual_seed(1)
draws = sample(found.kernel, energy, found.position, 6).draws
settings = TrainingSettings(num_iterations=3, num_chains=6)
train_sampler(L2HMC(2, 3), energy, lambda n, g: torch.randn(n, 2, generator=g), settings)
print(repr(draws.tolist()), found.message)
assert not ABSENT & sys.modules.keys()
"""


def energy(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x.square().sum(dim=1)


def test_samplers_need_nothing_of_the_packages_above(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    kernel = Turns([Flow(L2HMC(2, 2, 0.5), torch.zeros(2), torch.eye(2)), HMC(1, 0.5)])
    table = Comparison({"sampler": ["both"], "r_hat": [1.0]})
    learned = Learned(kernel, torch.zeros(4, 2), "both", table, True, 9, 0.1, 8, 2.5, "It is so.")
    learned.save(tmp_path / "learned.pt")
    assert Learned.load(tmp_path / "learned.pt").table.row("both")["r_hat"] == 1.0
    torch.manual_seed(1)
    draws = sample(kernel, energy, learned.position, 6).draws
    finished = subprocess.run(
        [sys.executable, "-c", CODE, "learned.pt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(samplers.__file__).parents[1])},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{draws.tolist()!r} It is so.\n"
