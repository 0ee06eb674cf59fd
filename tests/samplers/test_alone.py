"""A kernel is trained, saved and used where there is no Lightning and no model of images."""

import os
import subprocess
import sys
from pathlib import Path

import samplers

CODE = """
import sys

ABSENT = {"lightning", "pytorch_lightning", "lightning_fabric", "dglm", "data", "experiments"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
import torch
from samplers import L2HMC, TrainingSettings, sample, train_sampler

assert "torch._inductor" not in sys.modules  # it is for those who compile only

def energy(x):
    return 0.5 * (x / torch.tensor([0.3, 2.0])).square().sum(dim=1)

kernel, restored = (L2HMC(dim=2, num_leapfrogs=3, hidden=8) for _ in range(2))
settings = TrainingSettings(num_iterations=3, num_chains=6)
train_sampler(kernel, energy, lambda n, g: torch.randn(n, 2, generator=g), settings)
torch.save(kernel.state_dict(), "kernel.pt")
restored.load_state_dict(torch.load("kernel.pt", weights_only=True))
draws = []
for each in (kernel, restored):
    torch.manual_seed(1)
    draws.append(sample(each, energy, torch.zeros(4, 2), 6).draws)
assert draws[0].std() > 0
assert torch.equal(*draws)
assert not ABSENT & sys.modules.keys()
"""


def test_samplers_need_nothing_of_the_packages_above(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(samplers.__file__).parents[1])},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
