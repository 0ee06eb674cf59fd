"""The comparison of samplers on targets with known answers."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import experiments.targets.__main__ as command
from experiments.shared.cli import Stopped, run_command
from experiments.shared.runs import read_json
from experiments.targets import contenders, reference, table
from experiments.targets.__main__ import Options
from experiments.targets.reference import Reference
from samplers import HMC, GaussianMixture, comparison, seeded_generator
from samplers.posteriors import POSTERIORS

SMALL = [
    "--num_iterations=2",
    "--num_chains=20",
    "--num_steps=50",
    "--compile=false",
    "--quiet=true",
]


# Samplers that are trained for a moment may well stand still, and the command says so.
pytestmark = pytest.mark.filterwarnings("ignore:.* chains never move")


def tune_little(patch: pytest.MonkeyPatch) -> None:
    for name, value in {"MULTIPLES": (1.0,), "ROUNDS": ((1, 1, 1.0),), "FEWEST_DRAWS": 8}.items():
        patch.setattr(comparison, f"_{name}", value)


def make_small(patch: pytest.MonkeyPatch) -> None:
    """NUTS may be installed; its compiler would take most of the time."""
    patch.setattr(command, "nuts_is_installed", lambda: False)
    tune_little(patch)
    patch.setattr(contenders, "LENGTHS", (1, 2))
    patch.setattr(contenders, "_WARM_UP_STEPS", 30)
    patch.setattr(command, "weight_from_one_mode", lambda *given: 3.0)
    patch.setattr("samplers.learning._CHAINS", 20)
    patch.setattr("samplers.learning._FLOW_DRAWS", 20)
    patch.setattr("samplers.learning._Learning._scaled", lambda self, count: max(30, count // 100))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        with pytest.warns(UserWarning, match="do not agree"):
            command.main(["--target=mog", *SMALL, f"--output={folder}"])
    return folder


def test_a_run_leaves_a_row_for_each_sampler_and_its_picture(compared: Path) -> None:
    rows = json.loads((compared / "results.json").read_text())
    assert [row["sampler"] for row in rows] == list(get_args(command.SamplerName))[:-1]
    for row in rows:
        assert (row["target"], row["seed"]) == ("mog", 0)
        assert row["ess_per_gradient"] == row["ess"] / row["gradients_per_step"]
        assert row["seconds"] > 0
        assert row["training_gradients"] > 0
        assert row["weight_from_one_mode"] == 3
    # Annealed: four times as many iterations, of persistent and of fresh chains.
    assert rows[2]["training_gradients"] == 4 * 2 * 11 * 400
    assert rows[3]["training_gradients"] == 11 * 200
    assert (compared / "autocorrelation.png").stat().st_size < 300_000
    assert (compared / "table.md").read_text().count("\n") == len(rows) + 2


def test_a_finished_run_is_read_back(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((compared / "results.json").read_text())
    monkeypatch.setattr(command, "nuts_is_installed", lambda: False)
    monkeypatch.setattr(command, "sample", None)
    with pytest.warns(UserWarning, match="do not agree"):
        command.main(["--resume", str(compared)])
    assert json.loads((compared / "results.json").read_text()) == before


def test_the_table_and_the_csv_of_all_runs(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.main(["--runs", str(compared.parent), f"--csv={tmp_path / 'all.csv'}"])
    assert capsys.readouterr().out == (compared / "table.md").read_text()
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert [row["sampler"] for row in rows] == [
        row["sampler"] for row in read_json(compared / "results.json")
    ]


def test_a_line_of_several_seeds_has_medians_the_worst_and_the_settings_of_each(
    compared: Path,
) -> None:
    (row, *_) = read_json(compared / "results.json")
    rows = [
        {**row, "seed": seed, "settings": f"ε {step}", "min_coordinate_ess_per_gradient": ess}
        for seed, step, ess in ((1, 3, 0.25), (0, 2, 0.5), (2, 2, 1.0))
    ]
    line = table.markdown(rows).splitlines()[-1]
    assert "| ε 2; ε 3 | 0.5 |" in line
    assert line.endswith("| 0.25 |")
    rows[0]["min_coordinate_ess_per_gradient"] = float("nan")
    assert "| ε 2; ε 3 | nan |" in table.markdown(rows)


def test_two_runs_of_one_seed_are_not_taken_for_two_seeds(compared: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        shutil.copytree(compared, tmp_path / name)
    with pytest.raises(SystemExit, match=r"has 2 runs of mog with seed 0 \(learned\): leave one"):
        run_command(lambda: table.main(["--runs", str(tmp_path)]))


def test_seconds_count_the_training_and_say_when_it_has_paid() -> None:
    def row(sampler: str, ess: float, seconds: float, training: float) -> dict[str, Any]:
        figures = {"min_coordinate_ess": ess, "num_steps": 10, "num_chains": 2}
        times = {"seconds": seconds, "training_seconds": training}
        return {"target": "scg", "sampler": sampler, "seed": 0, **figures, **times}

    rows = [
        row("learned", 0.5, 1, 50),  # a draw takes .1 s
        row("HMC, tuned", 0.5, 20, 2),  # 2 s
        row("NUTS, blackjax", 1.0, 4, 10),  # .2 s
    ]
    lines = table.speed_table(rows).splitlines()[2:]
    assert lines == [
        "| scg | learned | 50 | 1e+03 | 1e+05 | 4e+02 |",
        "| scg | HMC, tuned | 2 | 2e+04 | 2e+06 | never |",
        "| scg | NUTS, blackjax | 10 | 2e+03 | 2e+05 |  |",
    ]


def test_exact_draws_are_worth_one_each_and_off_by_less_than_five_errors() -> None:
    known = Reference.of("rough_well")
    draws = known.target.sample(100_000, seeded_generator("cpu", 1)).view(100, 1000, 2)
    ess, correlations = known.paper(draws)
    assert abs(ess.value - 1) < 5 * ess.standard_error < 1
    # 1,000 lags of 100,000 draws of two coordinates.
    assert correlations["x²"][1:].abs().max() < 5 * (1 / 100_000) ** 0.5
    assert known.error(draws) < 5
    assert known.error(1.05 * draws) > 5


def test_the_weight_of_a_mode_is_seen_from_chains_that_start_there() -> None:
    overlapping = GaussianMixture([[-0.5, 0.0], [0.5, 0.0]], [0.3, 0.3], [0.3, 0.7]).float()
    apart = GaussianMixture([[-9.0, 0.0], [9.0, 0.0]], [0.3, 0.3], [0.3, 0.7]).float()
    assert reference.weight_from_one_mode(HMC(5, 0.3), overlapping, 0) < 4
    assert reference.weight_from_one_mode(HMC(5, 0.3), apart, 0) > 50


def test_long_runs_give_the_moments_of_a_posterior(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reference, "MOMENTS", tmp_path / "moments.json")
    monkeypatch.setitem(POSTERIORS, "normal", Normal)
    with pytest.raises(SystemExit, match=r"no moments of normal: python -m exp"):
        run_command(lambda: Reference.of("normal"))
    tune_little(monkeypatch)
    reference.main(["normal"], num_chains=20, num_steps=200)
    found = read_json(tmp_path / "moments.json")["normal"]
    for value, error, exact in zip(
        found["mean"], found["standard_error"], (3, 3, 10, 10), strict=True
    ):
        assert 0 < error < 0.3
        assert abs(value - exact) < 5 * error
    assert Reference.of("normal").error(3 + torch.randn(50, 400, 2)) < 5


class Normal(torch.nn.Module):
    dim, start_scale = 2, 1.0

    def forward(self, position: torch.Tensor) -> torch.Tensor:
        return 0.5 * (position - 3).square().sum(dim=-1)


def test_the_posteriors_that_are_compared_have_moments() -> None:
    known = read_json(reference.MOMENTS)
    for name in POSTERIORS:
        assert known[name]["r_hat"] < 1.01
        assert known[name]["ess_bulk"] > 5_000


def test_a_run_that_is_resumed_with_other_options_is_refused(compared: Path) -> None:
    before = {path: path.read_bytes() for path in compared.glob("*.*")}
    for other in ("--num_steps=140", "--target=scg", "--compile=true"):
        with pytest.raises(SystemExit, match=r"was begun with .*: leave that out, or start anew"):
            run_command(lambda other=other: command.main([f"--resume={compared}", other]))  # type: ignore[misc]
    assert {path: path.read_bytes() for path in compared.glob("*.*")} == before


def test_all_targets_of_the_paper_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str | None]] = []

    def compare(options: Options, saved: str) -> None:
        compared.append((options.target, options.output))
        if options.target == "mog" and options.output is not None:
            raise Stopped(15, "go on with it")

    monkeypatch.setattr(command, "run", compare)
    command.main(["--target=all"])
    assert compared == [("icg", None), ("scg", None), ("mog", None), ("rough_well", None)]
    compared.clear()
    with pytest.raises(Stopped) as stopped:
        command.main(["--target=all", "--output=folder"])
    assert compared == [("icg", "folder/icg"), ("scg", "folder/scg"), ("mog", "folder/mog")]
    assert stopped.value.hint == "go on with it; then --target rough_well"


def test_a_damaged_checkpoint_is_one_line(compared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compared, copy)
    damaged = copy / "checkpoints" / "row-hmc-tuned.pt"
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(
        SystemExit, match=r"error: .*row-hmc-tuned\.pt cannot be gone on from"
    ) as ended:
        run_command(lambda: command.main(["--resume", str(copy)]))
    assert "\n" not in str(ended.value.code)
    assert (copy / "results.json").read_bytes() == (compared / "results.json").read_bytes()
