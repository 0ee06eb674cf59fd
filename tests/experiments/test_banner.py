"""What the main job prints: a banner before, a bar with the time left, a table after."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dglm import DGLM
from experiments.mnist import main
from experiments.shared.callbacks import num_weights

Arguments = Callable[..., list[str]]


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_the_banner_says_what_the_run_then_takes(
    small: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(small(tmp_path / "run", quiet="false"))
    text = printed(capsys)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    dglm = DGLM.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert "L2HMC-DGLM, seed 0" in text
    sizes = {"decoder": dglm.model, "encoder": dglm.encoder, "kernel": dglm.kernel}
    for name, part in sizes.items():
        count = sum(
            value.numel() for value in part.state_dict().values() if value.is_floating_point()
        )
        assert count == num_weights(part)
        assert f"{name} {count:,}" in text
    assert "mnist: 360 train, 40 validation, 40 test images, 1 x 28 x 28, binarized" in text
    # Two steps of two leapfrogs and a first gradient, for 20 images an update.
    assert "20 images, 2 MH steps of 2 leapfrogs: 5 gradients of U each, 100 in all" in text
    assert "4 updates, 0.2 epochs, 4e+02 gradients" in text
    assert summary["training_gradient_evaluations"] == 400
    scoring = re.search(r"6 test images, 3 chains, 3 temperatures: (\S+) gradients", text)
    assert scoring is not None
    assert f"{summary['gradient_evaluations']:.2g}" == scoring[1]
    assert text.index("updates") < text.index("log p(x), annealed importance sampling")
    assert "left" in text


def test_batches_that_one_update_accumulates_are_counted(
    small: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"trainer.accumulate_grad_batches": 2, "model.step_size": 30}
    main(small(tmp_path / "run", quiet="false", kernel="hmc", **changes))
    text = printed(capsys)
    assert "40 images, 2 MH steps of 2 leapfrogs: 5 gradients of U each, 200 in all" in text
    assert "4 updates, 0.4 epochs, 8e+02 gradients" in text
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["training_gradient_evaluations"] == 800
    diverged = summary["training_divergence"]
    assert summary["training_divergences"] == round(diverged * 4 * 40 * 2) > 0


def test_a_training_that_only_the_clock_ends(
    small: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"trainer.max_steps": -1, "trainer.max_time": "00:00:00:01", "compile": "false"}
    main(small(tmp_path / "run", quiet="false", data__validation=0, **limits))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == summary["updates"] > 0
    assert "until its time is up or it is stopped" in printed(capsys)


@pytest.mark.parametrize("kernel", ["none", "hmc"])
def test_the_banner_of_other_models(
    kernel: str, small: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(small(tmp_path / "run", quiet="false", kernel=kernel, data__binarize="false"))
    text = printed(capsys)
    name, update = {
        "none": ("VAE", "20 images, no gradients of U"),
        "hmc": ("HMC-DGLM", "100 in all, to first order"),
    }[kernel]
    assert f"{name}, seed 0" in text
    assert update in text
    assert "1 x 28 x 28, grey levels" in text


def test_quiet_leaves_the_results_alone(
    small: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(small(tmp_path / "run", quiet="true"))
    text = printed(capsys)
    assert "updates" not in text
    assert "left" not in text
    assert "log p(x), annealed importance sampling" in text


def test_a_resumed_run_says_where_it_goes_on(
    small: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(small(tmp_path / "run"))
    main(["--resume", str(tmp_path / "run"), "--trainer.max_steps=6", "--quiet=false"])
    assert "6 updates, going on after 4" in printed(capsys)
