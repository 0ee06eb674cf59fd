import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from experiments.mnist import command_line, main
from experiments.shared.cli import CONFIGS

Arguments = Callable[..., list[str]]


def summary(folder: Path) -> dict[str, object]:
    return json.loads((folder / "summary.json").read_text())


def test_another_seed_gives_another_score(
    small: Arguments, checkpoint: Path, tmp_path: Path
) -> None:
    main(small(tmp_path / "run", seed=4))
    one, other = (summary(folder) for folder in (checkpoint.parents[1], tmp_path / "run"))
    assert one["log_likelihood"] != other["log_likelihood"]


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({}, 2000),
        ({"max_epochs": 40}, -1),
        ({"max_epochs": 40, "max_steps": 7}, 7),
        ({"max_steps": 7}, 7),
    ],
)
def test_epochs_that_are_asked_for_are_not_cut_short(
    limits: dict[str, int], steps: int, tmp_path: Path
) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text(yaml.safe_dump({"trainer": limits}))
    options = [f"--trainer.{name}={value}" for name, value in limits.items()]
    for index, given in enumerate((options, ["--config", str(path)])):
        cli = command_line([*given, "--output", str(tmp_path / str(index))])
        assert cli.trainer.max_steps == steps
        assert cli.trainer.max_epochs == limits.get("max_epochs", -1)


def test_help_names_the_shipped_configurations_and_ends_with_the_trainers_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        command_line(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(path.stem in text for path in CONFIGS.glob("*.yaml"))
    first = [text.index(f" --{name}") for name in ("kernel", "model", "data", "trainer")]
    assert first == sorted(first)


@pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_as_a_process_with_a_shipped_configuration_and_folders_that_hide_no_package(
    small: Arguments, tmp_path: Path, compiled: str
) -> None:
    for name in ("data", "experiments", "samplers"):
        (tmp_path / name).mkdir()
    for name in ("data", "samplers"):
        (tmp_path / name / "__init__.py").touch()
    command = [sys.executable, "-m", "experiments.mnist", "--config", "mnist_paper"]
    enough = {"num_chains": 16, "num_temperatures": 60, "start": "fitted"}  # to be silent
    scoring = {f"evaluation__{name}": value for name, value in enough.items()}
    changes = {"trainer__max_epochs": 1, "compile": compiled, **scoring}
    arguments = [*command, *small(tmp_path / "run", **changes)]
    finished = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert "log p(x)" in finished.stdout
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["data"]["name"] == "mnist"
    assert saved["model"]["step_size"] == 0.1


def test_a_run_without_output_takes_the_next_number(
    small: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main(small(None, kernel="none", trainer__max_steps=1))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mnist-001", "mnist-002"]
