"""What TensorBoard shows of a training."""

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dglm import DGLM
from experiments.mnist import main
from experiments.shared.callbacks import reconstructions

Arguments = Callable[..., list[str]]


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"images": 0})
    found.Reload()
    return found


def pictures(folder: Path, tag: str) -> dict[int, np.ndarray]:
    return {
        event.step: plt.imread(io.BytesIO(event.encoded_image_string))
        for event in events(folder).Images(tag)
    }


@pytest.mark.parametrize("kernel", ["none", "hmc", "l2hmc"])
def test_losses_acceptance_and_images_over_time(
    kernel: str, small: Arguments, tmp_path: Path
) -> None:
    main(small(tmp_path / "run", kernel=kernel, trainer__max_steps=5, model__learning_rate=0.05))
    found = events(tmp_path / "run")
    expected = {"train/log_elbo", "validation/log_elbo"}
    if kernel != "none":
        expected |= {"train/log_joint", "train/acceptance", "train/divergence", "train/step_size"}
        expected |= {"train/sampler_loss", "validation/acceptance"}
    assert expected <= set(found.Tags()["scalars"])
    for tag in ("reconstructions", "samples"):
        shown = pictures(tmp_path / "run", tag)
        assert sorted(shown) == [0, 2, 4, 5]
        assert not np.allclose(shown[0], shown[5])
    # Eight columns and a row for images, for q and for the kernel, each of 28 + 1 pixels.
    rows = 2 if kernel == "none" else 3
    assert pictures(tmp_path / "run", "reconstructions")[0].shape[:2] == (1 + 29 * rows, 1 + 29 * 8)
    assert pictures(tmp_path / "run", "samples")[5].shape[:2] == (1 + 29 * 8, 1 + 29 * 8)


def test_the_last_picture_is_of_the_trained_model(small: Arguments, tmp_path: Path) -> None:
    main(small(tmp_path / "run"))
    dglm = DGLM.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    shown = pictures(tmp_path / "run", "reconstructions")[4]
    images = torch.from_numpy(1 - shown[1:29, 1:, 0]).unflatten(1, (8, 29))[..., :28]
    images = images.transpose(0, 1).flatten(1).contiguous()
    assert set(images.unique().tolist()) == {0.0, 1.0}
    with torch.no_grad():
        _, from_q, from_kernel = reconstructions(dglm.eval(), images)
    for row, expected in ((1, from_q), (2, from_kernel)):
        first = 1 - shown[29 * row + 1 : 29 * row + 29, 1:29, 0]
        assert np.allclose(first, expected[0].view(28, 28).numpy(), atol=1.5 / 255)


def test_pictures_leave_training_as_it_is(
    small: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(small(tmp_path / "shown"))
    monkeypatch.setattr("experiments.shared.callbacks.ImagesOverTime._log", lambda *_: None)
    monkeypatch.setattr("experiments.shared.callbacks.ImagesOverTime._logged", 99, raising=False)
    main(small(tmp_path / "plain"))
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("shown", "plain")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_without_validation_images(small: Arguments, tmp_path: Path) -> None:
    main(small(tmp_path / "run", data__validation=0))
    assert sorted(pictures(tmp_path / "run", "samples")) == [0, 4]
