"""Options of the Trainer are obeyed or refused in one line; a fault in the code is not hidden."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dglm import DGLM
from dglm.chain import TRAINED_EVERY
from experiments.mnist import command_line, main, train
from experiments.shared.callbacks import logged_metrics
from experiments.shared.cli import run_command

Arguments = Callable[..., list[str]]
EARLY_STOPPING = '[{"class_path": "EarlyStopping", "init_args": {"monitor": "%s", "mode": "max"}}]'


@pytest.mark.parametrize(
    "changes",
    [{"kernel": "none"}, {"kernel": "hmc"}, {"kernel": "l2hmc", "model.coordinates": "true"}],
)
def test_the_metrics_that_a_callback_may_wait_for_are_those_that_are_logged(
    changes: dict[str, str], small: Arguments, tmp_path: Path
) -> None:
    cli = command_line(
        [
            *small(tmp_path / "run", **changes),
            f"--trainer.callbacks={EARLY_STOPPING % 'validation/log_elbo'}",
            f"--trainer.max_steps={TRAINED_EVERY}",
        ]
    )
    train(cli)
    assert set(logged_metrics(cli.model)) == set(cli.trainer.callback_metrics)


def test_own_loggers_take_the_place_of_the_run_s(small: Arguments, tmp_path: Path) -> None:
    logger = "lightning.pytorch.loggers.CSVLogger"
    own = [f"--trainer.logger={logger}", f"--trainer.logger.save_dir={tmp_path / 'own'}"]
    for name, options in (("mine", own), ("none", ["--trainer.logger=false"])):
        train(command_line([*small(tmp_path / name), *options]))
        assert not list((tmp_path / name).glob("metrics.csv"))
        assert not list((tmp_path / name).glob("events*"))
    assert len(list(tmp_path.rglob("metrics.csv"))) == 1


def test_float64_is_trained_and_scored(small: Arguments, tmp_path: Path) -> None:
    main(small(tmp_path / "run", trainer__precision="64-true"))
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["state_dict"]["kernel.kernel.log_step_size"].dtype == torch.float64
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_spawned_training_is_scored_and_the_same(
    small: Arguments, checkpoint: Path, tmp_path: Path
) -> None:
    plain, spawned = checkpoint.parents[1], tmp_path / "spawned"
    main([*small(spawned, quiet="false"), "--trainer.strategy=ddp_spawn"])
    weights = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (plain, spawned)
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert (spawned / "summary.json").read_text() == (plain / "summary.json").read_text()


def test_a_fault_in_the_code_keeps_its_traceback(
    small: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(module: DGLM, x: torch.Tensor, index: int) -> torch.Tensor:
        raise ValueError("a fault")

    monkeypatch.setattr(DGLM, "training_step", faulty)
    with pytest.raises(ValueError, match="a fault"):
        run_command(lambda: main(small(tmp_path / "run")))
