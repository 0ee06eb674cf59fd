import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from experiments.mnist import command_line
from experiments.quality import RECIPES, Model, Name, Quality, main, seconds_to
from experiments.shared.models import model_name
from experiments.shared.trainings import ImagesOptions

MODELS: list[Name] = ["hmc-2x12", "vae"]


def test_models_are_trained_once_for_each_length_and_compared_image_by_image(
    configuration: Path, root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "quality"
    options = [
        *("--training", str(configuration), "--data.root", str(root)),
        *("--models", f"[{', '.join(MODELS)}]"),
        *("--shares", "[0.0002, 0.0004]", "--seeds", "[0]", "--num_images", "6"),
        *("--num_chains", "3", "--num_temperatures", "3", "--start", "prior", "--quiet", "true"),
    ]
    main([*options, "--output", str(folder)])
    updates_of = {
        name: [round(x * RECIPES[name].updates) for x in (0.0002, 0.0004)] for name in MODELS
    }
    kept = folder / f"vae-{updates_of['vae'][1]}-seed0" / "checkpoints" / "last.ckpt"
    written = kept.stat().st_mtime_ns
    main(["--resume", str(folder), "--seeds", "[1]"])
    assert kept.stat().st_mtime_ns == written

    rows = json.loads((folder / "results.json").read_text())
    lengths = [(name, updates) for name in MODELS for updates in updates_of[name]]
    assert [(row["model"], row["updates"]) for row in rows] == lengths
    for row in rows:
        assert row["seeds"].keys() == {"0", "1"}
        assert row["log_likelihood"] == pytest.approx(sum(row["seeds"].values()) / 2)
        assert row["seconds"] > 0
    for reference, row in zip(rows[:2], rows[2:], strict=True):
        assert reference["over_reference"] is None
        one, other = (row["seeds"][seed] - reference["seeds"][seed] for seed in ("0", "1"))
        assert row["over_reference"]["difference"] == pytest.approx((one + other) / 2, abs=1e-4)
        error = row["over_reference"]["standard_error"]
        assert error == pytest.approx(abs(one - other) / 2, abs=1e-4)
    table = (folder / "table.md").read_text()
    assert all(RECIPES[row["model"]].label in table for row in rows)
    assert plt.imread(folder / "curve.png")[..., :3].std() > 0.05


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_what_their_labels_say_whatever_else_a_configuration_has(
    name: Name, root: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        "{kernel: hmc, model: {coordinates: false, num_mh_steps: 3, num_leapfrogs: 9}}"
    )
    options = Quality(training=str(other), data=ImagesOptions(name="mnist", root=str(root)))
    dglm = command_line(options.training_arguments(Model(name, 1, 0), tmp_path / "run")).model
    found = model_name(dglm)
    if dglm.sampler is not None:
        found += f", {dglm.num_mh_steps} × {dglm.sampler.num_leapfrogs}"
    assert found == RECIPES[name].label


def test_seconds_to_a_level_lie_between_lengths_and_nowhere_else() -> None:
    rows = [{"seconds": s, "log_likelihood": x} for s, x in ((10, -100), (40, -90), (90, -86))]
    assert seconds_to(-95, rows) == pytest.approx(20)
    assert seconds_to(-87, rows) == pytest.approx(math.exp(math.log(40) + 0.75 * math.log(2.25)))
    assert seconds_to(-101, rows) is None
    assert seconds_to(-85, rows) is None
