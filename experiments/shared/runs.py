"""Run folders and the files that commands write: nothing there is taken twice or overwritten."""

import glob
import itertools
import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from experiments.shared.cli import CommandError, Stopped
from samplers.io import write_whole

_FOLDER_VARIABLE, _OUTPUT_VARIABLE = "L2HMC_DGLM_RUN_FOLDER", "L2HMC_DGLM_OUTPUT"
GO_ON = "what is finished is kept; the same command goes on after it"


def create_run(output: str | None, prefix: str) -> Path:
    """Create the folder of a run: ``output``, or the first free runs/PREFIX-001, -002, ….

    The first process creates it; processes that it starts find it in the environment.

    Raises:
        CommandError: The folder exists and is not empty, or cannot be created.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        name = os.environ.get(_FOLDER_VARIABLE, output)
        if name is None:
            raise CommandError("choose --output where you start several processes yourself")
        return Path(name)
    try:
        folder = _new_folder(Path("runs"), prefix) if output is None else Path(output)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CommandError(
                f"{folder} exists already; choose another --output, or --resume {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"cannot create the run folder: {error.strerror} ({error.filename}); choose --output"
        ) from error
    os.environ[_FOLDER_VARIABLE] = str(folder)
    return folder


@contextmanager
def output_file(output: str | None, checkpoint: str, name: str, *suffixes: str) -> Iterator[Path]:
    """Yield the first of the files that a command will write, which differ in their suffix.

    Until the command ends, no other one takes the same. Processes that this one starts find the
    choice in the environment. What is kept beside the output, to go on after an interruption, is
    removed where the command has succeeded.

    Arguments:
        output: As the user chose it; None for the first free name beside the checkpoint's run.
        checkpoint: Of the model that the command looks at.
        name: What the file begins with where the user did not choose.
        suffixes: Of all files; the first is that of ``output``, which is written last: beside
            what an interrupted command has left for it, the others may exist.

    Raises:
        CommandError: One of the files exists, or cannot be written, or another command is about
            to write them, or the suffix is another.
    """
    folder = Path(checkpoint).parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    with ExitStack() as locks:
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            chosen = os.environ.get(_OUTPUT_VARIABLE, output)
            path = first_free(folder, name, *suffixes) if chosen is None else Path(chosen)
        elif output is None:
            path = next(
                path
                for path in _numbered(folder, name, suffixes[0])
                if not _finished_files(path, suffixes)
                and locks.enter_context(_claimed_output(path))
                and not _finished_files(path, suffixes)
            )
        else:
            path = _checked(Path(output), suffixes)
            if not locks.enter_context(_claimed_output(path)):
                raise CommandError(f"another command is to write {path}; choose another --output")
        os.environ[_OUTPUT_VARIABLE] = str(path)
        try:
            yield path
        except Stopped as stopped:
            if partial_files(path):
                stopped.hint = GO_ON
            raise
        if not rank_zero_only.rank:  # type: ignore[attr-defined]
            for partial in partial_files(path):
                partial.unlink()


def _checked(path: Path, suffixes: Sequence[str]) -> Path:
    if path.suffix != suffixes[0]:
        raise CommandError(f"--output must end in {suffixes[0]}, got {path}")
    for file in _finished_files(path, suffixes):
        raise CommandError(f"{file} exists already; choose another --output")
    return path


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder; the system lets go of it when the process dies, however it does.

    A command may hold what another, in the same process, holds already. Processes that this one
    starts leave it to it.

    Raises:
        CommandError: Another process is working there.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        yield
        return
    # It stays, as a file that is removed could be locked anew by somebody who has opened it before.
    with _claimed(folder, FileLock(folder / ".lock", is_singleton=True)) as alone:
        if not alone:
            raise CommandError(f"another command is working in {folder}; wait until it has ended")
        yield


@contextmanager
def _claimed_output(path: Path) -> Iterator[bool]:
    """Hold the name of an output, of any suffix; yield whether no other command does."""
    lock = FileLock(path.with_name(f".{path.stem}.lock"))
    with _claimed(path, lock) as alone:
        try:
            yield alone
        finally:
            if alone:
                Path(lock.lock_file).unlink(missing_ok=True)


@contextmanager
def _claimed(path: Path, lock: BaseFileLock) -> Iterator[bool]:
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    except NotImplementedError:  # by the file system: a lock is advice
        yield True
        return
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}; choose --output") from error
    try:
        yield True
    finally:
        lock.release()


def _new_folder(parent: Path, prefix: str) -> Path:
    """Create the first of the numbered folders that is not there, and that nobody else creates."""
    for folder in _numbered(parent, prefix, ""):
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("numbers do not end")


def first_free(parent: Path, prefix: str, *suffixes: str) -> Path:
    """Return PARENT/PREFIX-001 with the first suffix, or the first number free with all of them."""
    endings = suffixes or ("",)
    numbered = _numbered(parent, prefix, endings[0])
    return next(path for path in numbered if not _finished_files(path, endings))


def _numbered(parent: Path, prefix: str, suffix: str) -> Iterator[Path]:
    return (parent / f"{prefix}-{number:03d}{suffix}" for number in itertools.count(1))


def partial_files(output: Path) -> list[Path]:
    """Return what an interrupted command has left beside its output, to go on from."""
    return list(output.parent.glob(f"{glob.escape(output.name)}.partial-*"))


def _finished_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    if not path.exists() and partial_files(path):
        return []
    files = [path, *(path.with_suffix(suffix) for suffix in suffixes[1:])]
    return [file for file in files if file.exists()]


def print_files(folder: Path) -> None:
    """Print where the files of a run are."""
    for path in sorted(folder.glob("[!.]*")):
        Console().print(f"  {path}", highlight=False, soft_wrap=True)


@rank_zero_only
def keep_metrics(folder: Path) -> None:
    """Put the metrics of a run that is resumed aside: the logger starts its file afresh."""
    if (folder / "metrics.csv").exists():
        (folder / "metrics.csv").rename(first_free(folder, "metrics-before", ".csv"))


@rank_zero_only
def keep_config(folder: Path, text: str) -> None:
    """Write the configuration of a run that is resumed, the former one put aside if it differs."""
    path = folder / "config.yaml"
    if path.exists() and (before := path.read_text()) != text:
        write_whole(before, first_free(folder, "config-before", ".yaml"))
    write_whole(text, path)


def check_same_options(
    folder: Path, before: dict[str, Any], given: dict[str, Any], free: Collection[str]
) -> None:
    """Raise CommandError where a run would be gone on with by other options than it was begun with.

    Arguments:
        folder: Of the run.
        before: The options that it was begun with, by name.
        given: Those it would be gone on with.
        free: Names of options that may differ.
    """
    for name, value in given.items():
        if name not in free and before.get(name) != value:
            raise CommandError(
                f"{folder} was begun with {name} {before.get(name)}, not {value}: leave that out, "
                "or start anew with another --output"
            )


def partial_file(output: Path, name: str) -> Path:
    """Return where a command keeps something until ``output`` is written."""
    return output.with_name(f"{output.name}.partial-{name}")


def write_json(content: Any, path: Path) -> None:
    """Write results; what is no finite number becomes null, as JSON has no word for it."""
    write_whole(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", path)


def read_json(path: Path) -> Any:
    """Return what :func:`write_json` wrote, with NaN where it wrote null."""
    return json.loads(path.read_text(), object_hook=_with_nan)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(found: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in found.items()}
