"""Training in two processes by Lightning's DDP, with gloo on the CPU."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from data import ImageDataModule
from dglm import DGLM, AISSettings, estimate_log_likelihood
from experiments.shared.checkpoints import load_checkpoint

SCRIPT = Path(__file__).with_name("two_processes.py")
STEPS, IMAGES = 3, 7


@pytest.fixture(scope="module")
def in_two(small: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an L2HMC-DGLM in two processes; return the run folder."""
    folder = tmp_path_factory.mktemp("two") / "run"
    changes = {
        "trainer__devices": 2,
        "trainer__strategy": "ddp",
        "trainer__max_steps": STEPS,
        "model__decay_share": 0,
        "evaluation__num_images": IMAGES,
        "evaluation__num_chains": 16,
        "evaluation__num_temperatures": 20,
        "evaluation__start": "encoder",
    }
    command = [sys.executable, str(SCRIPT), str(folder.parent), *small(folder, **changes)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return folder


def kept(in_two: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(in_two.parent / f"{name}-{rank}.pt") for rank in range(2)]


def test_updates_are_those_of_one_process_with_the_images_and_noise_of_both(
    in_two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = torch.load(in_two / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    starts, ends = ([part["state"] for part in kept(in_two, name)] for name in ("start", "end"))
    for one, other in (starts, ends, (saved, ends[0])):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    first, second = (torch.cat(part["batches"]) for part in kept(in_two, "end"))
    assert len(first) == len(second) == STEPS * 20
    assert not (first[:, None] == second[None]).all(dim=-1).any()

    module, _ = load_checkpoint(str(in_two / "checkpoints" / "last.ckpt"))
    module.load_state_dict(starts[0])
    batches = [part["batches"] for part in kept(in_two, "end")]
    configured: Any = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(DGLM, "log", lambda *arguments, **options: None)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for rank in range(2):
            monkeypatch.setattr(DGLM, "global_step", property(lambda module, step=step: step))
            monkeypatch.setattr(DGLM, "global_rank", property(lambda module, rank=rank: rank))
            losses.append(module.training_step(batches[rank][step], 0))
        (sum(losses) / 2).backward()
        module.configure_gradient_clipping()
        optimizer.step()
        schedule.step()
    distance, moved = 0.0, 0.0
    for name, value in module.named_parameters():
        distance += float((value.detach() - ends[0][name]).square().sum())
        moved += float((starts[0][name] - ends[0][name]).square().sum())
    # Adam turns a gradient of rounding errors into a full step, so not each weight agrees.
    assert distance**0.5 < 1e-4 * moved**0.5


def test_each_image_is_scored_once_and_as_by_one_process(in_two: Path, root: Path) -> None:
    summary = json.loads((in_two / "summary.json").read_text())
    assert summary["num_images"] == IMAGES
    module, _ = load_checkpoint(str(in_two / "checkpoints" / "last.ckpt"))
    data = ImageDataModule("mnist", str(root), validation=40)
    data.setup()
    images: Tensor = data.heldout("test")[:IMAGES]
    settings = AISSettings(16, 20, 10)
    one = estimate_log_likelihood(module.model, images, settings, module.encoder)
    error = float(one.standard_error.square().sum().sqrt()) / IMAGES
    assert summary["effective_sample_size"] > 4
    difference = summary["log_likelihood"] - float(one.log_likelihood.mean())
    assert difference != 0  # other noise
    assert abs(difference) < 5 * (error**2 + summary["standard_error_chains"] ** 2) ** 0.5
    spread = float(one.log_likelihood.std()) / IMAGES**0.5
    assert summary["standard_error"] == pytest.approx(spread, rel=0.2)
