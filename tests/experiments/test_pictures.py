"""The commands that draw a trained model: inpaint, posterior and samples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import inpaint, posterior, samples
from experiments.shared.checkpoints import load_checkpoint

Drawn = Callable[..., dict[str, Any]]


@pytest.fixture
def drawn(checkpoint: Path, root: Path, tmp_path: Path) -> Drawn:
    """A function that draws by a command and returns its summary."""

    def drawn(main: Callable[[list[str]], None], **options: object) -> dict[str, Any]:
        output = tmp_path / "picture.png"
        given = {"checkpoint": checkpoint, "data.root": root, "output": output, "quiet": "true"}
        main([f"--{name}={value}" for name, value in (given | options).items()])
        assert 0 < output.stat().st_size < 300_000
        return json.loads(output.with_suffix(".json").read_text())

    return drawn


def test_inpainting_counts_classes(drawn: Drawn) -> None:
    summary = drawn(inpaint.main, mask="left", sweeps=6, num_images=4, num_chains=3)
    assert summary["mask"] == "left"
    assert summary["num_images"] == 4
    # Two steps of two leapfrogs and a first gradient, for each chain and sweep.
    assert summary["gradient_evaluations"] == 4 * 3 * 6 * 5
    for name in ("encoder", "kernel"):
        assert 1 <= summary[f"{name}_classes"] <= 6
        assert 0 <= summary[f"{name}_switches"] <= 100
        assert summary[f"{name}_classes_standard_error"] >= 0
    gain = summary["kernel_classes"] - summary["encoder_classes"]
    assert summary["gain_classes"] == pytest.approx(gain)
    assert 1 <= summary["reference_classes"] <= 6
    for name in ("encoder", "kernel", "reference"):
        assert 0 <= summary[f"{name}_distance"] <= 1
    images = [each["kernel_distance"] - each["encoder_distance"] for each in summary["images"]]
    assert summary["gain_distance"] == pytest.approx(sum(images) / 4)


def test_posterior_of_one_image(drawn: Drawn) -> None:
    summary = drawn(posterior.main, num_chains=12, num_steps=40, num_warmup=40, search=3)
    assert summary["searched_images"] == 3
    assert 0 <= summary["searched_skewed"] <= 3
    assert 0 <= summary["image"] < 3
    for name in ("kernel", "hmc"):
        for figure in ("skewness", "excess_kurtosis"):
            assert f"{name}_{figure}" in summary
            assert summary[f"{name}_{figure}_standard_error"] > 0


def test_samples_side_by_side(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "samples.png"
    panels, save = [], samples.save_samples
    monkeypatch.setattr(
        samples, "save_samples", lambda *given: panels.extend(given[1]) or save(*given)
    )
    samples.main(
        ["--checkpoints", str(checkpoint), str(checkpoint), "--num_images=4", f"--output={output}"]
    )
    assert [image.shape for _, image in panels] == 2 * [(4, 784)]
    dglm, _ = load_checkpoint(str(checkpoint))
    z = torch.randn(2, dglm.model.latent_dim)
    assert samples.expected(dglm.double(), z).dtype == torch.float64
    assert 0 < output.stat().st_size < 300_000
