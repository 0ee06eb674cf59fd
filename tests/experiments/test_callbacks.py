"""What a run of the main job leaves, prints and shows while it trains; its compiled chain."""

import io
import json
import math
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dglm import DGLM, AmortizedPreconditioned, Decoder, Encoder, GenerativeModel
from experiments.mnist import command_line, main, train
from experiments.report import warnings
from experiments.shared.callbacks import compilation, num_weights, reconstructions
from samplers import HMC, L2HMC, Kernel

Arguments = Callable[..., list[str]]
FILES = ["config.yaml", "inpainting.png", "metrics.csv", "reconstructions.png", "samples.png"]
SCORE = ["log_likelihood", "standard_error", "num_images", "num_chains", "num_temperatures"]
SCORE += ["acceptance", "gradient_evaluations", "dataset", "split", "binarization", "start", "seed"]


class Run(NamedTuple):
    """Of the main job, five updates long."""

    folder: Path
    printed: str

    @property
    def summary(self) -> dict[str, float]:
        return json.loads((self.folder / "summary.json").read_text())

    def pictures(self, tag: str) -> dict[int, np.ndarray]:
        return {
            event.step: plt.imread(io.BytesIO(event.encoded_image_string))
            for event in self.events().Images(tag)
        }

    def events(self) -> EventAccumulator:
        found = EventAccumulator(str(self.folder), size_guidance={"images": 0})
        found.Reload()
        return found


def run(arguments: list[str], folder: Path) -> Run:
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text):
        patch.setenv("COLUMNS", "200")
        main(arguments)
    return Run(folder, " ".join(text.getvalue().split()))


@pytest.fixture(scope="module", params=["none", "hmc", "l2hmc"])
def done(
    request: pytest.FixtureRequest, small: Arguments, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    folder = tmp_path_factory.mktemp("done") / request.param
    changes = {"trainer__max_steps": 5, "quiet": "false"}
    return run(small(folder, kernel=request.param, **changes), folder)


def test_all_files_are_there(done: Run) -> None:
    folder, found, kernel = done.folder, done.summary, done.folder.name
    assert {path.name for path in folder.iterdir()} >= {*FILES, "checkpoints", "summary.json"}
    assert found.keys() >= set(SCORE)
    named = kernel if kernel == "none" else f"{kernel} in coordinates"
    assert (found["kernel"], found["dataset"], found["updates"]) == (named, "mnist", 5)
    assert ("log_joint_kernel" in found) == (kernel != "none")
    if kernel != "none":
        gain = found["log_joint_kernel"] - found["log_joint_q"]
        assert found["log_joint_gain"] == pytest.approx(gain, abs=1e-4)
        assert 0 < found["kernel_round_trip_error"] < 1e-3
        assert found["kernel_log_det_error"] < 1e-3
    assert all(np.isfinite(value) for value in found.values() if isinstance(value, float))
    for name in ("samples", "reconstructions", "inpainting"):
        assert plt.imread(folder / f"{name}.png")[..., :3].std() > 0.05, f"{name}.png is blank"


def test_the_banner_says_what_the_run_then_takes(done: Run) -> None:
    text, summary = done.printed, done.summary
    dglm = DGLM.load_from_checkpoint(done.folder / "checkpoints" / "last.ckpt")
    sizes = {"decoder": dglm.model, "encoder": dglm.encoder, "kernel": dglm.sampler}
    sizes["coordinates"] = dglm.coordinate_network
    for name, part in sizes.items():
        if part is not None:
            values = part.state_dict().values()
            count = sum(value.numel() for value in values if value.is_floating_point())
            assert num_weights(part) == count - (done.folder.name == "hmc" and name == "kernel")
            assert f"{name} {num_weights(part):,}" in text
    assert "mnist: 360 train, 40 validation, 40 test images, 1 x 28 x 28, binarized" in text
    # Two steps of two leapfrogs and a first gradient, for 20 images an update; with siblings of an
    # eighth of them half a gradient more.
    shared = "20 images, 2 MH steps of 2 leapfrogs:"
    title, update, gradients = {
        "none": ("VAE, seed 0", "20 images, no gradients of U", 0),
        "hmc": (
            "HMC-DGLM in coordinates, seed 0",
            f"{shared} 5 gradients of U each, 100 in all, to first order",
            500,
        ),
        "l2hmc": (
            "L2HMC-DGLM in coordinates, seed 0",
            f"{shared} 5.125 gradients of U each, 102 in all, to first order, but for siblings",
            512,
        ),
    }[done.folder.name]
    assert title in text
    assert update in text
    assert f"5 updates, 0.3 epochs, {gradients:.2g} gradients" in text
    assert summary["training_gradient_evaluations"] == gradients
    scoring = re.search(r"6 test images, 3 chains, 3 temperatures: (\S+) gradients", text)
    assert scoring is not None
    assert f"{summary['gradient_evaluations']:.2g}" == scoring[1]
    assert text.index("updates") < text.index("log p(x), annealed importance sampling")
    assert "left" in text


def test_losses_acceptance_and_images_over_time(done: Run) -> None:
    kernel = done.folder.name
    expected = {"train/log_elbo", "validation/log_elbo"}
    if kernel != "none":
        expected |= {"train/log_joint", "train/acceptance", "train/divergence", "train/step_size"}
        expected |= {"train/coordinate_loss", "validation/acceptance"}
    assert expected <= set(done.events().Tags()["scalars"])
    for tag in ("reconstructions", "samples"):
        shown = done.pictures(tag)
        assert sorted(shown) == [0, 2, 4, 5]
        assert not np.allclose(shown[0], shown[5])
    # Eight columns and a row for images, for q and for the kernel, each of 28 + 1 pixels.
    rows = 2 if kernel == "none" else 3
    assert done.pictures("reconstructions")[0].shape[:2] == (1 + 29 * rows, 1 + 29 * 8)
    assert done.pictures("samples")[5].shape[:2] == (1 + 29 * 8, 1 + 29 * 8)


def test_the_last_picture_is_of_the_trained_model(done: Run) -> None:
    dglm = DGLM.load_from_checkpoint(done.folder / "checkpoints" / "last.ckpt")
    shown = done.pictures("reconstructions")[5]
    images = torch.from_numpy(1 - shown[1:29, 1:, 0]).unflatten(1, (8, 29))[..., :28]
    images = images.transpose(0, 1).flatten(1).contiguous()
    assert set(images.unique().tolist()) == {0.0, 1.0}
    with torch.no_grad():
        _, *expected = reconstructions(dglm.eval(), images)
    for row, means in enumerate(expected, 1):
        first = 1 - shown[29 * row + 1 : 29 * row + 29, 1:29, 0]
        assert np.allclose(first, means[0].view(28, 28).numpy(), atol=1.5 / 255)


def test_pictures_leave_training_as_it_is_and_a_quiet_run_can_be_gone_on_with(
    small: Arguments, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.shared.callbacks.ImagesOverTime._log", lambda *_: None)
    monkeypatch.setattr("experiments.shared.callbacks.ImagesOverTime._logged", 99, raising=False)
    folder = tmp_path / "run"
    quiet = run(small(folder), folder).printed
    assert weights(folder / "checkpoints" / "last.ckpt") == weights(checkpoint)
    assert "updates" not in quiet
    assert "left" not in quiet
    assert "log p(x), annealed importance sampling" in quiet
    resumed = ["--resume", str(folder), "--trainer.max_steps=6", "--quiet=false"]
    assert "6 updates, going on after 4" in run(resumed, folder).printed


def weights(checkpoint: Path) -> dict[str, list]:
    content = torch.load(checkpoint, weights_only=True)
    return {name: value.tolist() for name, value in content["state_dict"].items()}


def test_without_validation_images_until_the_clock_ends_it(
    small: Arguments, tmp_path: Path
) -> None:
    limits = {"trainer.max_steps": -1, "trainer.max_time": "00:00:00:01", "data.validation": 0}
    limits["model.decay_share"] = 0
    found = run(small(tmp_path / "run", quiet="false", **limits), tmp_path / "run")
    assert found.summary["training_images"] == 400
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == found.summary["updates"] > 0
    assert sorted(found.pictures("samples")) == [0, found.summary["updates"]]
    assert "until its time is up or it is stopped" in found.printed


def test_batches_that_one_update_accumulates_are_counted_and_divergences_summed_up(
    small: Arguments, tmp_path: Path
) -> None:
    changes = {"trainer.accumulate_grad_batches": 2, "model.step_size": 30, "kernel": "hmc"}
    changes["data.binarize"] = "false"
    found = run(small(tmp_path / "run", quiet="false", **changes), tmp_path / "run")
    text, summary = found.printed, found.summary
    assert "40 images, 2 MH steps of 2 leapfrogs: 5 gradients of U each, 200 in all" in text
    assert "4 updates, 0.4 epochs, 8e+02 gradients" in text
    assert "1 x 28 x 28, grey levels" in text
    assert summary["training_gradient_evaluations"] == 800
    diverged = summary["training_divergence"]
    assert diverged > 0.01
    assert summary["training_divergences"] == round(diverged * 4 * 40 * 2)
    assert summary["skipped_updates"] == 0
    assert f"{diverged:.2%} of the transitions in training" in text
    assert "diverged, more than 1%: try a smaller step size" in text


@pytest.mark.parametrize("place", [0, 1])
def test_a_kernel_whose_way_back_is_nan_is_told_of(place: int) -> None:
    errors = [0.0, 0.0]
    errors[place] = math.nan
    sound = {"skipped_updates": 0, "training_divergence": 0.0, "kernel_divergence": 0.0}
    names = "kernel_acceptance", "kernel_round_trip_error", "kernel_log_det_error"
    (told,) = warnings(sound | dict(zip(names, [0.9, *errors], strict=True)))
    assert "rounding keeps the kernel from being exact" in told


def test_a_compiled_training_is_the_eager_one_and_only_its_step_runs_compiled_code(
    small: Arguments,
    checkpoint: Path,
    tmp_path: Path,
    compiler: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, compilations, original = set(), list[type[Kernel]](), Kernel.compile

    def compile(kernel: Kernel) -> None:
        compilations.append(type(kernel))
        original(kernel, backend=compiler)

    monkeypatch.setattr(Kernel, "compile", compile)

    def note(dglm: DGLM, step: str) -> None:
        original, before = getattr(dglm, step), dglm.kernel

        def noted(*arguments: object) -> object:
            seen.add((step, dglm.kernel is before))
            return original(*arguments)

        setattr(dglm, step, noted)

    cli = command_line(small(tmp_path / "run", compile="true"))
    before = cli.model.kernel
    for step in ("training_step", "validation_step"):
        note(cli.model, step)
    train(cli)
    assert cli.model.kernel is before
    assert seen == {("training_step", False), ("validation_step", True)}
    assert compilations == [AmortizedPreconditioned]
    found, expected = (
        DGLM.load_from_checkpoint(path).state_dict()
        for path in (tmp_path / "run" / "checkpoints" / "last.ckpt", checkpoint)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("kernel", "least"), [(L2HMC(3, 2), 440), (HMC(2), 440 / 3)])
def test_the_banner_says_where_compiling_pays(
    kernel: Kernel, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.shared.callbacks.training_gradients", lambda *_: 440)
    module = DGLM(GenerativeModel(Decoder(3, 6, (4,)), 3), Encoder(6, 3, (4,)), kernel)
    trainer: Any = SimpleNamespace(world_size=1)
    for bound, pays in ((least + 0.1, False), (least - 0.1, True)):
        monkeypatch.setattr("experiments.shared.callbacks.WORTH_COMPILING", bound)
        found = compilation(False, module, trainer)
        assert found == "nothing" + pays * "; --compile true makes a training of this length faster"
