import csv
import json
import math
import shutil
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from dglm import DGLM
from dglm.ais import AISResult, quiet_estimate
from dglm.importance import mean_and_error
from experiments.evaluate import main
from experiments.shared.cli import run_command
from experiments.shared.scoring import ScoringOptions, score_summary

REQUIRED = {
    "log_likelihood",
    "standard_error",
    "num_images",
    "num_chains",
    "num_temperatures",
    "acceptance",
    "gradient_evaluations",
    "dataset",
    "split",
    "binarization",
    "start",
    "seed",
}


def arguments(model: Path, root: Path, result: Path, /, **changes: object) -> list[str]:
    options = {
        "checkpoint": model,
        "data.root": root,
        "num_images": 10,
        "num_chains": 8,
        "num_temperatures": 10,
        "num_leapfrogs": 3,
        "start": "prior",
        "batch_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "quiet": "true",
        "output": result,
    }
    if "curve" in changes:
        del options["num_temperatures"]
    options.update({name.replace("__", "."): value for name, value in changes.items()})
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def results(output: Path) -> dict[str, object]:
    return json.loads(output.read_text())


@pytest.mark.parametrize("start", ["prior", "encoder", "coordinates"])
def test_results_and_scores_of_each_image(
    checkpoint: Path, root: Path, tmp_path: Path, start: str
) -> None:
    output = tmp_path / "new" / "result.json"
    extras = {"curve": "10,3", "bdmc": "true", "bdmc_images": 3, "iwae_samples": 150}
    extras |= {"start": start, "split": "train" if start == "prior" else "test"}
    main(arguments(checkpoint, root, output, **extras))
    found = results(output)
    assert found.keys() >= REQUIRED | {"bdmc_gap", "bdmc_gap_standard_error", "iwae_bound"}
    assert [point["num_temperatures"] for point in found["curve"]] == [3, 10]
    assert (found["start"], found["split"]) == (start, extras["split"])
    with output.with_suffix(".csv").open() as file:
        scores = [float(row["log_likelihood"]) for row in csv.DictReader(file)]
    assert len(scores) == 10
    assert found["log_likelihood"] == pytest.approx(sum(scores) / 10, abs=1e-9)
    assert found["standard_error"] == pytest.approx(statistics.stdev(scores) / 10**0.5, rel=1e-9)
    assert plt.imread(output.with_suffix(".png"))[..., :3].std() > 0.01
    assert {path.name for path in output.parent.iterdir()} == {
        "result.csv",
        "result.json",
        "result.png",
    }


def test_another_seed_gives_another_estimate(checkpoint: Path, root: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        main(arguments(checkpoint, root, tmp_path / f"{seed}.json", seed=seed))
    one, two = (results(tmp_path / f"{seed}.json")["log_likelihood"] for seed in (1, 2))
    assert one != two


def interrupt(given: list[str]) -> None:
    """Evaluate, up to the third batch."""
    step = DGLM.test_step

    def failing_step(self: DGLM, x: torch.Tensor, index: int) -> None:
        if index == 2:
            raise RuntimeError("power cut")
        step(self, x, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DGLM, "test_step", failing_step)
        with pytest.raises(RuntimeError, match="power cut"):
            main(given)


def test_what_is_kept_of_an_evaluation_is_left_alone_by_another(
    checkpoint: Path, root: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parents[1], run)
    last = run / "checkpoints" / "last.ckpt"
    given = arguments(last, root, Path("null"))
    interrupt(given)
    kept = {path: path.read_bytes() for path in run.glob("evaluation-001*")}
    for change in ("--num_images=7", "--num_temperatures=3"):
        with pytest.raises(
            SystemExit, match=r"evaluation-001\.json\.partial-0\.pt is of another run"
        ):
            run_command(lambda change=change: main([*given, change]))
    own = last.read_bytes()
    content = torch.load(last, weights_only=True)
    content["state_dict"]["model.decoder.output.bias"] += 1
    torch.save(content, last)
    with pytest.raises(SystemExit, match=r"is of another run \(checkpoint was"):
        run_command(lambda: main(given))
    assert {path: path.read_bytes() for path in run.glob("evaluation-*")} == kept
    last.write_bytes(own)
    main(given)
    assert sorted(path.name for path in run.glob("evaluation-*")) == [
        "evaluation-001.csv",
        "evaluation-001.json",
    ]


def test_an_interrupted_curve_goes_on_and_its_points_are_the_estimates_of_their_temperatures(
    checkpoint: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = arguments(checkpoint, root, tmp_path / "curve.json", curve="3,10")
    interrupt(curve)
    estimate, calls = quiet_estimate, []
    monkeypatch.setattr(
        "dglm.module.quiet_estimate",
        lambda *given, **options: calls.append(1) or estimate(*given, **options),
    )
    main(curve)
    assert len(calls) == 1 + 3  # of three batches a point, two of the first were done
    for point, count in zip(results(tmp_path / "curve.json")["curve"], (3, 10), strict=True):
        alone = tmp_path / f"{count}.json"
        main(arguments(checkpoint, root, alone, num_temperatures=count))
        assert point["log_likelihood"] == results(alone)["log_likelihood"]
        assert point["gradient_evaluations"] == results(alone)["gradient_evaluations"]


def test_errors_of_a_score_are_over_images_and_over_their_chains() -> None:
    log_likelihood, error = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.3, 0.4, 1.2])
    rest = torch.zeros(3, 2), torch.ones(3), torch.zeros(3, dtype=torch.bool), 7
    result = AISResult(log_likelihood, error, *rest)
    summary = score_summary(result, ScoringOptions())
    assert summary["log_likelihood"] == 3
    assert summary["standard_error"] == pytest.approx((7 / 3) ** 0.5)  # variance 7, 3 images
    assert summary["standard_error_chains"] == pytest.approx(1.3 / 3)  # .09 + .16 + 1.44 = 1.3²
    unknown = result._replace(standard_error=torch.tensor([0.3, math.nan, 1.2]))
    summary = score_summary(unknown, ScoringOptions())
    assert math.isnan(summary["standard_error_chains"])
    assert summary["unreliable_images"] == 1


def test_one_image_has_no_error_bar() -> None:
    value, error = mean_and_error(torch.tensor([3.0]))
    assert value == 3
    assert math.isnan(error)
