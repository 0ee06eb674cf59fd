"""A trained kernel is saved, loaded and used where there is no Lightning and no model of images."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import samplers
from samplers import L2HMC, sample, seeded_generator

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ImportError(f"{name} is not installed")

ABSENT = ("lightning", "pytorch_lightning", "lightning_fabric", "dglm", "data", "experiments")
sys.meta_path.insert(0, Absent())
"""

ENERGY = """
import torch
from samplers import L2HMC, TrainingSettings, sample, seeded_generator, train_sampler

def energy(x):
    return 0.5 * (x / torch.tensor([0.3, 2.0])).square().sum(dim=1)
"""

TRAIN = """
kernel = L2HMC(dim=2, num_leapfrogs=3, hidden=8)
settings = TrainingSettings(num_iterations=3, num_chains=6)
train_sampler(kernel, energy, lambda n, g: torch.randn(n, 2, generator=g), settings)
torch.save(kernel.state_dict(), "kernel.pt")
"""

USE = """
kernel = L2HMC(dim=2, num_leapfrogs=3, hidden=8)
kernel.load_state_dict(torch.load("kernel.pt", weights_only=True))
chains = sample(kernel, energy, torch.zeros(4, 2), 6, generator=seeded_generator("cpu", 1))
torch.save(chains.draws, "draws.pt")
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(samplers.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )


def test_a_trained_kernel_is_saved_loaded_and_used(tmp_path: Path) -> None:
    for code in (ENERGY + TRAIN, ENERGY + USE):
        finished = run(code, tmp_path)
        assert finished.returncode == 0, finished.stderr
    state = torch.load(tmp_path / "kernel.pt", weights_only=True)
    kernel = L2HMC(dim=2, num_leapfrogs=3, hidden=8).float()
    kernel.load_state_dict(state)

    def energy(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (x / torch.tensor([0.3, 2.0], dtype=x.dtype)).square().sum(dim=1)

    start = torch.zeros(4, 2, dtype=torch.float32)
    chains = sample(kernel, energy, start, 6, generator=seeded_generator("cpu", 1))
    draws = torch.load(tmp_path / "draws.pt", weights_only=True)
    torch.testing.assert_close(chains.draws, draws)
    assert draws.std() > 0


def test_the_compiler_is_loaded_by_those_who_compile_only(tmp_path: Path) -> None:
    finished = run("import samplers; print('torch._inductor' in sys.modules)", tmp_path)
    assert finished.stdout == "False\n", finished.stderr
