import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import yaml

from dglm import DGLM, AISSettings, GenerativeModel
from dglm.ais import gradient_evaluations
from experiments.likelihood_curve import cost
from experiments.likelihood_curve.__main__ import main
from experiments.likelihood_curve.models import LikelihoodCurve, Model
from experiments.likelihood_curve.results import draw_curve
from experiments.mnist import MnistCLI, command_line, train
from experiments.shared.cli import run_command
from experiments.shared.trainings import ImagesOptions, across_seeds, score_model, train_model


@pytest.fixture
def options(configuration: Path, root: Path) -> list[str]:
    return [
        *("--training", str(configuration), "--data.root", str(root)),
        *("--num_epochs", "1", "--num_mh_steps", "[2]", "--seeds", "[0]", "--splits", "[test]"),
        *("--num_images", "6", "--num_chains", "3", "--num_temperatures", "3"),
        *("--start", "prior", "--quiet", "true"),
    ]


def test_every_kernel_is_trained_and_compared_and_no_model_twice(
    options: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "curve"
    main([*options, "--output", str(folder)])
    found = json.loads((folder / "results.json").read_text())
    kept = folder / "hmc-2-seed0" / "checkpoints" / "last.ckpt"
    written = kept.stat().st_mtime_ns
    for lost in ("training.json", "test.json", "test.csv"):
        (folder / "l2hmc-2-seed0" / lost).unlink()
    (folder / "results.json").unlink()
    main(["--resume", str(folder)])
    assert json.loads((folder / "results.json").read_text()) == found

    # Models may be added, those that are there stay.
    main(["--resume", str(folder), "--seeds", "[1]"])
    assert kept.stat().st_mtime_ns == written
    assert yaml.safe_load((folder / "config.yaml").read_text())["seeds"] == [0, 1]
    before = yaml.safe_load((folder / "config-before-001.yaml").read_text())
    assert before["seeds"] == [0]
    results = json.loads((folder / "results.json").read_text())
    rows, paired = results["rows"], results["differences"]
    assert all(row in rows for row in found["rows"])
    scores = {(r["kernel"], r["num_mh_steps"], r["seed"]): r["log_likelihood"] for r in rows}
    models = [("none", 1), ("hmc", 2), ("l2hmc", 2)]
    assert scores.keys() == {(*model, seed) for model in models for seed in (0, 1)}
    assert {row["updates"] for row in rows} == {360 // 20}
    assert {(r["kernel"], r["gradients_per_update"]) for r in rows} == {
        ("none", 0),
        ("hmc", 2 * 2 + 1),
        ("l2hmc", 2 * 2 + 1 + 2 * 2 / 32),
    }
    for (of, minus), row in zip(
        [(("l2hmc", 2), ("hmc", 2)), (("l2hmc", 2), ("none", 1)), (("hmc", 2), ("none", 1))],
        paired,
        strict=True,
    ):
        assert (row["of"], row["minus"]) == (of[0], minus[0])
        one, other = (scores[*of, seed] - scores[*minus, seed] for seed in (0, 1))
        assert row["difference"] == pytest.approx((one + other) / 2, abs=1e-4)
        assert row["standard_error"] == pytest.approx(abs(one - other) / 2, abs=1e-4)
    assert plt.imread(folder / "curve.png")[..., :3].std() > 0.05

    # Scores are not mixed with others.
    for other in (["--num_temperatures", "4"], ["--num_epochs", "2"], ["--data.name", "mnist"]):
        name, value = other[0].removeprefix("--"), other[1]
        with pytest.raises(SystemExit, match=f"was begun with {name} .*, not {value}: leave"):
            run_command(lambda other=other: main(["--resume", str(folder), *other]))  # type: ignore[misc]
    assert json.loads((folder / "results.json").read_text()) == results


def test_all_kernels_start_from_the_same_weights_and_see_the_same_images(
    configuration: Path, root: Path, tmp_path: Path
) -> None:
    curve = LikelihoodCurve(training=str(configuration), data=ImagesOptions(root=str(root)))
    found = []
    for kernel in ("none", "hmc", "l2hmc"):
        model = Model(kernel, 2, 5)  # type: ignore[arg-type]
        cli = command_line(curve.training_arguments(model, tmp_path / model.name))
        cli.datamodule.setup()
        weights = {
            name: value
            for name, value in cli.model.state_dict().items()
            if not name.startswith("kernel.")
        }
        found.append((weights, list(cli.datamodule.train_dataloader())))
    for weights, batches in found[1:]:
        torch.testing.assert_close(weights, found[0][0], rtol=0, atol=0)
        torch.testing.assert_close(batches, found[0][1], rtol=0, atol=0)


def test_a_dry_run_prints_the_cost_and_leaves_nothing(
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    main([*options, "--seeds", "[0, 1]", "--dry_run", "true"])
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    # 18 updates of 20 images, two steps of two leapfrogs and an eighth of a gradient of siblings.
    assert f"{18 * 20 * 5.125:.2g}" in next(
        line for line in printed.split("\n") if "l2hmc-2" in line
    )
    # Three chains of two transitions for six images, in one batch with one pilot.
    gradients = gradient_evaluations(
        GenerativeModel(torch.nn.Linear(2, 4), 2), 6, AISSettings(3, 3, 5), "prior"
    )
    assert f"{6 * gradients:.2g}" in next(
        line for line in printed.split("\n") if "6 scores" in line
    )
    assert "all trainings, 2 seed(s)" in printed


def test_a_dry_run_times_scores_where_the_training_was(
    configuration: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(cli: MnistCLI) -> None:
        train(cli)
        monkeypatch.setattr(type(cli.trainer.strategy), "root_device", torch.device("meta"))

    def places(options: LikelihoodCurve, dglm: DGLM, images: torch.Tensor) -> float:
        assert dglm.device.type == images.device.type == "meta"
        return 0.25

    monkeypatch.setattr(cost, "train", elsewhere)
    monkeypatch.setattr(cost, "scoring_seconds", places)
    curve = LikelihoodCurve(training=str(configuration), data=ImagesOptions(root=str(root)))
    found = cost.training_cost(curve, Model("none", 1, 0))
    assert found.seconds_a_scoring_gradient == 0.25


def test_data_are_the_trainings_and_devices_one_and_accumulated_batches_are_counted(
    configuration: Path, root: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load(configuration.read_text())
    content["data"]["root"] = str(root)
    content["trainer"] |= {"devices": 2, "accumulate_grad_batches": 2}
    configuration.write_text(yaml.safe_dump(content))
    sizes = {"num_epochs": 1, "num_images": 6, "num_chains": 3, "num_temperatures": 3}
    curve = LikelihoodCurve(training=str(configuration), quiet=True, **sizes)
    model, folder = Model("hmc", 2, 0), tmp_path / "model"
    cli = command_line(curve.training_arguments(model, tmp_path / "unused"))
    assert cli.trainer.world_size == 1
    train_model(curve, curve.training_arguments(model, folder), folder)
    score_model(curve, folder, "test")
    assert json.loads((folder / "test.json").read_text())["dataset"] == "mnist"
    figures = json.loads((folder / "training.json").read_text())
    assert figures["updates"] == 9
    assert figures["training_gradient_evaluations"] == 9 * 40 * 5
    assert cost.training_cost(curve, model)[:2] == (9, 9 * 40 * 5)


def test_a_split_without_images_is_refused_before_anything_is_trained(
    options: list[str], configuration: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load(configuration.read_text())
    content["data"]["validation"] = 0
    configuration.write_text(yaml.safe_dump(content))
    given = [*options, "--splits", "[validation]", "--output", str(tmp_path / "curve")]
    with pytest.raises(SystemExit, match="there are no validation images of mnist"):
        run_command(lambda: main(given))
    assert list(tmp_path.iterdir()) == [configuration]


def test_errors_over_seeds() -> None:
    found = across_seeds([1.0, 2.0, 6.0])
    assert found["difference"] == pytest.approx(3)
    assert found["standard_error"] == pytest.approx((7 / 3) ** 0.5)
    assert across_seeds([1.0]) == {"difference": 1.0, "standard_error": None}


def test_a_split_that_the_paper_has_not_is_drawn_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    draw_curve(LikelihoodCurve(splits=["validation"]), [], [], path)
    assert path.exists()
