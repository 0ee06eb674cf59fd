"""Names of outputs, of which none is taken twice, and results as JSON."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from experiments import mnist
from experiments.shared.cli import CommandError, run_command
from experiments.shared.runs import (
    check_same_options,
    held,
    output_file,
    partial_file,
    read_json,
    write_json,
)

# Of Python 3.12 and of JAX, on the fork of a process that has threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*os.fork:RuntimeWarning"),
]

SUFFIXES = (".png", ".json")


def test_commands_at_once_on_one_checkpoint_have_outputs_of_their_own(tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "checkpoints" / "last.ckpt")
    (tmp_path / "filled-001.json").touch()  # whose picture is missing
    with (
        output_file(None, checkpoint, "filled", *SUFFIXES) as first,
        output_file(None, checkpoint, "filled", *SUFFIXES) as second,
    ):
        assert [first, second] == [tmp_path / f"filled-00{number}.png" for number in (2, 3)]
        first.touch()
    with output_file(None, checkpoint, "filled", *SUFFIXES) as third:
        assert third == tmp_path / "filled-003.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filled-001.json", "filled-002.png"]


@contextmanager
def held_by_another(claim: AbstractContextManager[object]) -> Iterator[None]:
    """Have another process hold a claim, until it is killed."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            with claim:
                os.write(write, b"held")
                time.sleep(600)
        finally:
            os._exit(1)
    try:
        assert os.read(read, 4) == b"held"
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_output_that_another_process_is_to_write_is_refused_until_that_is_dead(
    tmp_path: Path,
) -> None:
    output = tmp_path / "some" / "result.png"
    with (
        held_by_another(output_file(str(output), "", "", *SUFFIXES)),
        pytest.raises(CommandError, match=r"another command is to write .*result\.png; choose"),
        output_file(str(output), "", "", *SUFFIXES),
    ):
        pass
    with output_file(str(output), "", "", *SUFFIXES) as path:
        assert path == output
    assert not list(path.parent.iterdir())


def test_an_output_of_the_same_stem_is_refused_and_what_was_begun_for_it_kept(
    tmp_path: Path,
) -> None:
    scores, picture = str(tmp_path / "result.json"), str(tmp_path / "result.png")
    begun = partial_file(Path(scores), "0.pt")
    begun.touch()
    with (
        held_by_another(output_file(scores, "", "", ".json", ".csv")),
        pytest.raises(CommandError, match="another command is to write"),
        output_file(picture, "", "", *SUFFIXES),
    ):
        pass
    with output_file(picture, "", "", *SUFFIXES):
        pass
    assert begun.exists()


def test_two_live_runs_never_share_a_folder_and_a_dead_one_holds_nothing(
    small: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    mnist.main(small(run, kernel="none", trainer__max_steps=1))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    resumed = ["--resume", str(run), "--trainer.max_steps=2"]
    message = r"another command is working in .*run; wait until it"
    with held_by_another(held(run)):
        with pytest.raises(SystemExit, match=message):
            run_command(lambda: mnist.main(resumed))
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    mnist.main(resumed)
    assert read_json(run / "summary.json")["updates"] == 2


def test_a_run_is_gone_on_with_by_its_own_options_alone() -> None:
    before = {"num_steps": 5, "quiet": False}
    check_same_options(Path("run"), before, {"num_steps": 5, "quiet": True}, ("quiet",))
    with pytest.raises(CommandError, match="run was begun with num_steps 5, not 6: leave that out"):
        check_same_options(Path("run"), before, {"num_steps": 6, "quiet": True}, ("quiet",))


def test_numbers_that_are_not_finite_become_null_and_nan_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json({"ess": math.nan, "chains": 3, "rows": [{"pair": (0.5, math.inf)}]}, path)
    assert (
        "".join(path.read_text().split()) == '{"ess":null,"chains":3,"rows":[{"pair":[0.5,null]}]}'
    )
    found = read_json(path)
    assert math.isnan(found["ess"])
    assert found["chains"] == 3
