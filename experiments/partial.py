"""What a command keeps beside its output until that is written, to go on after an interruption."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from experiments.command import CommandError, Stopped
from experiments.outputs import partial_files
from samplers.io import write_whole

GO_ON = "what is finished is kept; the same command goes on after it"


def partial_file(output: Path, name: str) -> Path:
    """Return where a command keeps something until ``output`` is written."""
    return output.with_name(f"{output.stem}.partial-{name}")


def remove_partial_files(output: Path) -> None:
    """Remove what a finished command no longer needs."""
    for path in partial_files(output):
        path.unlink()


@contextmanager
def resumable(output: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Let partial files be gone on from by the command that has left them, and no other.

    Processes that this one starts share the files, and leave the look at them to it.

    Arguments:
        output: What is written in the end.
        identity: What must be equal for the files to be used again.

    Raises:
        CommandError: The files are of another command.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        yield
        return
    marker, text = partial_file(output, "options.json"), json.dumps(identity, indent=2)

    def kept() -> bool:
        return any(not path.name.startswith(marker.name) for path in partial_files(output))

    if kept() and not (marker.exists() and marker.read_text() == text):
        raise CommandError(
            f"{marker} is of another command, not finished; remove it and what begins like it, or "
            "choose another --output"
        )
    write_whole(text, marker)
    try:
        yield
    except Stopped as stopped:
        if kept():
            stopped.hint = GO_ON
        raise
    finally:
        if not kept():
            marker.unlink(missing_ok=True)
