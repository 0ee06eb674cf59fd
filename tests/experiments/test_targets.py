"""The comparison of samplers on targets with known answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import experiments.targets.__main__ as command
from experiments.shared.cli import Stopped, run_command
from experiments.shared.runs import read_json, write_json
from experiments.targets import table
from experiments.targets.measure import Cost, Reference, mode_weights
from experiments.targets.options import Compare, SamplerOptions
from samplers import (
    HMC,
    L2HMC,
    TARGETS,
    Chains,
    GaussianMixture,
    Kernel,
    TrainingHistory,
    TrainingSettings,
    seeded_generator,
)

SMALL = [
    "--training.num_iterations=12",
    "--training.num_chains=10",
    "--num_chains=10",
    "--num_steps=132",
    "--compile=false",
    "--quiet=true",
]


@pytest.fixture(autouse=True)
def without_nuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra ``bench`` may be installed; its compiler would take most of the time."""
    monkeypatch.setattr(command, "nuts_is_installed", lambda: False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "nuts_is_installed", lambda: False)
        command.main(
            [
                "--target=mog",
                *SMALL,
                "--temperatures=[1, 3, 9]",
                "--whitened.num_leapfrogs=2",
                f"--output={folder}",
            ]
        )
    return folder


def test_a_run_leaves_a_row_for_each_sampler_and_its_pictures(run: Path) -> None:
    rows = json.loads((run / "results.json").read_text())
    assert [row["sampler"] for row in rows] == [
        "L2HMC",
        "L2HMC, whitened",
        "HMC, same leapfrogs",
        "HMC, tuned",
        "MALA, tuned",
        "HMC, diagonal mass, tuned",
        "HMC, dense mass, tuned",
        "Parallel tempering",
    ]
    for row in rows:
        assert row["target"] == "mog"
        assert row["seed"] == 0
        assert row["ess_per_gradient"] == row["ess"] / row["gradients_per_step"]
        assert row["seconds"] > 0
    # Persistent and fresh chains, and the first gradient of each iteration.
    assert rows[0]["training_gradients"] == 12 * 11 * 20
    assert rows[-1]["gradients_per_step"] == 30
    for picture in ("autocorrelation", "chains", "learned"):
        assert (run / f"{picture}.png").stat().st_size < 300_000
    assert (run / "table.md").read_text().count("\n") == len(rows) + 2


def test_a_row_of_a_mixture_says_where_chains_from_one_mode_end(run: Path) -> None:
    rows = json.loads((run / "results.json").read_text())[:7]
    for row in rows:
        assert sum(row["mode_weights"]) == pytest.approx(1)
    # Thirteen small steps, none of a kernel that learned to cross.
    assert rows[0]["mode_weights"][0] > 0.9


@pytest.mark.parametrize(
    ("iterations", "leapfrogs", "wanted", "expected"),
    [
        (4000, 10, True, True),
        (3999, 10, True, False),
        (5000, 1, True, False),
        (4000, 10, False, False),
    ],
)
def test_a_training_of_many_leapfrogs_is_compiled_and_its_kernel_is_not(
    iterations: int,
    leapfrogs: int,
    wanted: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    compiled: list[L2HMC] = []
    monkeypatch.setattr(L2HMC, "compile", lambda kernel: compiled.append(kernel))
    history = TrainingHistory(*torch.zeros(7, 1))
    monkeypatch.setattr(command, "train_sampler", lambda *arguments, **options: history)
    sampler = SamplerOptions(num_leapfrogs=leapfrogs)
    training = TrainingSettings(iterations)
    options = Compare(sampler=sampler, training=training, compile=wanted, quiet=True)
    target = TARGETS["scg"]().float()
    kernel, _ = command.train(target, target.sample(2), options, tmp_path, sampler)
    assert len(compiled) == expected
    assert kernel not in compiled


@pytest.mark.parametrize("wanted", ["true", "false"])
def test_chains_that_are_timed_are_compiled_and_searches_are_not(
    wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled: list[Kernel] = []
    monkeypatch.setattr(Kernel, "compile", lambda kernel: compiled.append(kernel))
    options = ["--target=scg", *SMALL, f"--output={tmp_path / 'run'}", "--whitened=null"]
    command.main([*options, f"--compile={wanted}"])
    samplers = [row["sampler"] for row in read_json(tmp_path / "run" / "results.json")]
    assert len(samplers) == 6
    assert len(compiled) == (6 if wanted == "true" else 0)


def test_modes_are_counted_by_where_the_chains_end() -> None:
    target = GaussianMixture([[-0.5, 0.0], [0.5, 0.0]], [0.3, 0.3], [0.3, 0.7]).float()
    found = mode_weights(HMC(5, 0.3), target, 2000, 60, seeded_generator("cpu", 0))
    for value, error, weight in zip(*found.values(), (0.3, 0.7), strict=True):
        # The modes overlap: shares vary less than certain ones, whose error is √(w (1 - w) / n).
        assert 0 < error < (0.3 * 0.7 / 2000) ** 0.5
        assert abs(value - weight) < 5 * error


def test_a_run_that_is_resumed_gives_the_same_figures(run: Path, tmp_path: Path) -> None:
    before = json.loads((run / "results.json").read_text())
    command.main(["--resume", str(run)])
    after = json.loads((run / "results.json").read_text())
    for first, second in zip(before, after, strict=True):
        assert first["ess"] == second["ess"] or first["ess"] != first["ess"]
        assert first["acceptance"] == second["acceptance"]


def test_the_table_of_all_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.main(["--runs", str(run.parent)])
    assert capsys.readouterr().out == (run / "table.md").read_text()


def test_a_line_of_several_seeds_has_the_settings_of_each(run: Path) -> None:
    (row, *_) = read_json(run / "results.json")
    rows = [
        {**row, "seed": seed, "settings": f"ε {step}"} for seed, step in ((1, 3), (0, 2), (2, 2))
    ]
    assert "| ε 2; ε 3 |" in table.markdown(rows)


def test_two_runs_of_one_seed_are_not_taken_for_two_seeds(run: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        shutil.copytree(run, tmp_path / name)
    with pytest.raises(SystemExit, match=r"has 2 runs of mog with seed 0 \(L2HMC\): leave one"):
        run_command(lambda: table.main(["--runs", str(tmp_path)]))


def test_a_median_is_not_known_where_a_seed_is_not(run: Path) -> None:
    (row, *_) = read_json(run / "results.json")
    for values in ([float("nan"), 1, 2], [1, float("nan"), 2]):
        rows = [{**row, "seed": seed, "ess_squares": value} for seed, value in enumerate(values)]
        assert "| nan |" in table.markdown(rows)


def test_a_figure_that_is_not_known_is_null_and_the_table_goes_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = read_json(run / "results.json")[0] | {"ess": float("nan")}
    (tmp_path / "stuck").mkdir()
    write_json([row], tmp_path / "stuck" / "results.json")
    table.main(["--runs", str(tmp_path)])
    assert "| nan |" in capsys.readouterr().out


def test_the_table_of_speeds_is_relative_to_nuts_of_the_same_seed() -> None:
    def row(sampler: str, seed: int, ess: float, seconds: float, training: float) -> dict[str, Any]:
        figures = {"ess": ess, "min_coordinate_ess": ess / 4, "num_steps": 10, "num_chains": 2}
        times = {"seconds": seconds, "training_seconds": training}
        return {"target": "scg", "sampler": sampler, "seed": seed, **figures, **times}

    rows = [
        row("L2HMC", 0, 0.5, 1, 9),
        row("NUTS, blackjax", 0, 1.0, 1, 1),
        row("L2HMC", 1, 0.5, 2, 8),
        row("NUTS, blackjax", 1, 0.25, 2, 0),
        row("L2HMC", 2, 0.5, 2, 8),  # whose NUTS is missing
    ]
    lines = table.speed_table(rows).splitlines()
    # (0.5 + 2) / 2 without training; (0.1 + 0.4) / 2 with it.
    assert lines[2:] == ["| scg | L2HMC | 1.2 | 0.25 | 1.2 | 0.25 |"]
    assert len({line.count("|") for line in lines}) == 1


def test_the_brief_table_is_of_few_samplers_with_the_papers_figure_beside_l2hmc(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.main(["--runs", str(run.parent), "--brief"])
    header, _, *lines = capsys.readouterr().out.splitlines()
    samplers = [line.split(" | ")[1] for line in lines]
    assert samplers == [
        "L2HMC",
        "L2HMC, whitened",
        "HMC, dense mass, tuned",
    ]
    place = header.split(" | ").index("paper's ESS/step")
    assert [line.split(" | ")[place] for line in lines] == ["0.0324", *[""] * (len(lines) - 1)]


def test_tuning_sees_through_chains_that_step_from_side_to_side() -> None:
    target = TARGETS["scg"]().float()
    start = target.sample(100, seeded_generator("cpu", 0))
    reference = Reference(target)
    sides = torch.stack([start if step % 2 else -start for step in range(200)], dim=1)
    assert reference.efficiency(sides) < 1e-2
    still = start[:, None].expand(-1, 200, -1)
    assert reference.efficiency(still) == 0
    independent = target.sample(20_000, seeded_generator("cpu", 1)).view(100, 200, 2)
    # 100 chains with one wide axis: five standard errors of √(2 / 100) each.
    assert reference.efficiency(independent) == pytest.approx(1, abs=5 * (2 / 100) ** 0.5)


def test_independent_draws_are_worth_one_each() -> None:
    target = TARGETS["rough_well"]().float()
    draws = target.sample(100_000, seeded_generator("cpu", 0)).view(100, 1000, 2)
    ones = torch.ones(100, 1000)
    chains = Chains(draws, ones, ones, ones > 2)
    row = Reference(target).measure("exact", "", chains, Cost(4.0, 2.0)).row
    # The value's own standard error, and for x² √(2 / (chains · coordinates)).
    assert abs(row["ess"] - 1) < 5 * row["ess_standard_error"] < 1
    assert row["ess_squares"] == pytest.approx(1, abs=5 * (2 / 200) ** 0.5)
    assert row["min_coordinate_ess"] == pytest.approx(1, abs=0.1)
    assert row["ess_per_second"] == pytest.approx(row["ess"] * 100_000 / 2)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--target=mobius"], "mobius"),
        (["--target=scg", "--training.num_chains=0"], "num_chains must be at least 1"),
        (["--target=scg", "--training.jump_scale=-1"], "jump_scale must be positive"),
        (["--target=scg", "--sampler.num_leapfrogs=0"], "num_leapfrogs must be at least 1"),
        (["--target=scg", "--num_steps=3"], "num_steps must be at least"),
        (["--target=scg", "--colour=red"], "colour"),
        (["--resume=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], culprit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: command.main(arguments))
    assert culprit in str(ended.value.code)
    assert "\n" not in str(ended.value.code)
    assert not list(tmp_path.rglob("*.json"))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Compare]:
    """Compare nothing; return the options of what would be compared."""
    found: list[Compare] = []
    monkeypatch.setattr(command, "compare", lambda options, saved: found.append(options))
    return found


def test_the_shipped_configuration_comes_first_however_the_target_is_named(
    compared: list[Compare], tmp_path: Path
) -> None:
    (tmp_path / "icg.yaml").write_text("target: icg\nnum_chains: 9\n")
    command.main([])
    command.main(["--target=scg"])
    command.main(["--config", str(tmp_path / "icg.yaml")])
    default, named, own = compared
    assert default == named
    assert default.whitened is not None
    assert (own.target, own.num_chains, own.sampler.hidden) == ("icg", 9, 100)


def test_a_run_that_is_resumed_keeps_its_options(run: Path, compared: list[Compare]) -> None:
    command.main(["--target=mog", f"--resume={run}"])
    assert compared[0].training.num_iterations == 12
    assert compared[0].temperatures == [1, 3, 9]


def test_a_run_that_is_resumed_with_other_options_is_refused(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.glob("*.*")}
    for other in ("--num_steps=140", "--training.num_chains=11", "--compile=true"):
        with pytest.raises(SystemExit, match=r"was begun with .*: leave that out, or start anew"):
            run_command(lambda other=other: command.main([f"--resume={run}", other]))  # type: ignore[misc]
    assert {path: path.read_bytes() for path in run.glob("*.*")} == before


@pytest.mark.parametrize("other", ["banana", "all"])
def test_a_run_that_is_resumed_keeps_its_target(
    other: str, run: Path, compared: list[Compare]
) -> None:
    with pytest.raises(SystemExit, match=f"is a run of mog; leave out --target {other}"):
        run_command(lambda: command.main([f"--target={other}", f"--resume={run}"]))
    assert not compared


def test_all_targets_of_the_paper_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str | None]] = []

    def compare(options: Compare, saved: str) -> None:
        compared.append((options.target, options.output))
        if options.target == "mog" and options.output is not None:
            raise Stopped(15, "go on with it")

    monkeypatch.setattr(command, "compare", compare)
    command.main(["--target=all"])
    assert compared == [("icg", None), ("scg", None), ("mog", None), ("rough_well", None)]
    compared.clear()
    with pytest.raises(Stopped) as stopped:
        command.main(["--target=all", "--output=folder"])
    assert compared == [("icg", "folder/icg"), ("scg", "folder/scg"), ("mog", "folder/mog")]
    assert stopped.value.hint == "go on with it; then --target rough_well"


@pytest.mark.parametrize("name", ["training.pt", "training-whitened.pt"])
def test_a_damaged_checkpoint_is_one_line(run: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    damaged = copy / "checkpoints" / name
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(SystemExit, match=f"error: .*{name} cannot be gone on from") as ended:
        run_command(lambda: command.main(["--resume", str(copy)]))
    assert "\n" not in str(ended.value.code)
    assert (copy / "results.json").read_bytes() == (run / "results.json").read_bytes()
