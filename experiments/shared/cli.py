"""Command lines: options, configurations, progress bars, signals and one-line errors."""

import errno
import itertools
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from lightning.fabric import Fabric
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data import DataError
from dglm.callbacks import TrainingFailed
from samplers.io import ResumeError

CONFIGS = Path(__file__).parents[1] / "configs"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SWITCHES = ("--quiet", "--compile", "--bdmc", "--dry_run", "--brief", "--speed")
_OF_THE_SYSTEM = {errno.EACCES, errno.EDQUOT, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}
"""Errors of files that no command can foresee: not permitted, no space, broken."""

Options = TypeVar("Options")


class CommandError(Exception):
    """Something that the user of a command can put right."""


class Stopped(SystemExit):
    """SIGINT or SIGTERM: the user, or a scheduler, wants the command to end.

    Arguments:
        number: The signal.
        hint: What to do to go on.
    """

    def __init__(self, number: int, hint: str = "nothing was saved") -> None:
        super().__init__(128 + number)
        self.number = number
        self.hint = hint


class ConfigFile(ActionConfigFile):
    """The option --config: a configuration file, or the name of one that the package ships."""

    def __call__(self, parser: Any, config: Any, values: Any, option: str | None = None) -> None:
        """Read the file into the configuration.

        Raises:
            CommandError: The file cannot be read, or says something that cannot be.
        """
        shipped = CONFIGS / f"{values}.yaml"
        if isinstance(values, str) and not Path(values).exists() and shipped.exists():
            values = str(shipped)
        try:
            super().__call__(parser, config, values, option)
        except (ArgumentError, OSError, TypeError, ValueError) as error:
            raise CommandError(f"--config {values}: {error}") from error


def command_parser(name: str, description: str | None) -> ArgumentParser:
    """Return the parser of ``python -m experiments.NAME``, with its --config alone."""
    parser = ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action=ConfigFile, help="Configuration file.")
    return parser


def command_options(
    name: str, description: str | None, options: type[Options], arguments: list[str] | None
) -> Options:
    """Return the options of ``python -m experiments.NAME``, a dataclass."""
    return parse_options(command_parser(name, description), options, arguments)


def parse_options(
    parser: ArgumentParser,
    options: type[Options],
    arguments: list[str] | None,
    present: frozenset[str] = frozenset(),
) -> Options:
    """Return a dataclass of options, all but those present already added to the parser."""
    parser.add_class_arguments(options, skip=set(present))
    given = sys.argv[1:] if arguments is None else arguments
    with refused_options():
        parsed = parser.instantiate(parser.parse_args(with_switches(given))).as_dict()
        del parsed["config"]
        return options(**parsed)


@contextmanager
def refused_options() -> Iterator[None]:
    """Turn what a constructor finds wrong with options into CommandError.

    Anywhere else a ValueError is a fault in the code, and keeps its traceback.
    """
    try:
        yield
    except DataError:
        raise
    except ValueError as error:
        raise CommandError(str(error)) from error


def with_switches(arguments: list[str]) -> list[str]:
    """Return the arguments with a switch that stands alone, as ``--quiet``, as ``--quiet=true``."""
    return [
        f"{argument}=true" if argument in _SWITCHES and after.startswith("-") else argument
        for argument, after in itertools.pairwise([*arguments, "--"])
    ]


def run_command(main: Callable[[], None]) -> None:
    """Run a command; turn what the user can put right into one line and exit status 1.

    SIGINT and SIGTERM end it with one line, too, and with 130 and 143. Any other exception is a
    fault in the code, and keeps its traceback.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The compiler's word on a CUDA toolkit without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # A run folder holds more than the logs, and nothing that a run wrote is deleted.
    warnings.filterwarnings("ignore", ".*directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning's own
    try:
        with _signals_handled_by(stop):
            main()
    except Stopped as stopped:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            print(f"{signal.Signals(stopped.number).name}: {stopped.hint}", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            raise
        sys.exit(f"error: {error}")
    except (
        ArgumentError,
        CommandError,
        DataError,
        MisconfigurationException,
        ResumeError,
        TrainingFailed,
    ) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def stop(number: int, frame: object = None) -> None:
    """Raise Stopped: the handler of SIGINT and SIGTERM."""
    raise Stopped(number)


@contextmanager
def stopped_between(progress: Callable[[int], object]) -> Iterator[Callable[[int], None]]:
    """Have SIGINT and SIGTERM wait for a moment at which what is done can be saved.

    Yields ``progress``, which is called at such moments, and then raises Stopped where a signal
    has arrived; a second signal does not wait.
    """
    arrived: list[int] = []

    def notice(number: int, frame: object) -> None:
        arrived.append(number)
        signal.signal(number, stop)

    def advance(amount: int) -> None:
        progress(amount)
        if arrived:
            raise Stopped(arrived[0])

    with _signals_handled_by(notice):
        yield advance
    if arrived:
        raise Stopped(arrived[0])


@contextmanager
def _signals_handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    former = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def choose_device(accelerator: str) -> torch.device:
    """Return the device of one of Lightning's accelerators: cpu, gpu or auto.

    Raises:
        CommandError: There is no such accelerator here.
    """
    try:
        return Fabric(accelerator=accelerator, devices=1).device
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise CommandError(f"--accelerator {accelerator}: {error}") from error


def resumed_arguments(arguments: list[str]) -> list[str]:
    """Put the configuration of a run that is resumed before the other arguments.

    Raises:
        CommandError: --resume names no folder with a config.yaml, or there is an --output, too.
    """
    folder = option_value(arguments, "--resume")
    if folder is None:
        return arguments
    config = Path(folder) / "config.yaml"
    if not config.is_file():
        raise CommandError(f"--resume {folder}: there is no {config}; name a run folder")
    if option_value(arguments, "--output") is not None:
        raise CommandError(f"--resume goes on in {folder}: leave --output out")
    return ["--config", str(config), *arguments]


def option_value(arguments: list[str], name: str) -> str | None:
    """Return the value of an option before the arguments are parsed; None where it is missing."""
    for index, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option == name:
            return value or " ".join(arguments[index + 1 : index + 2])
    return None


def progress_columns() -> Progress:
    """Return an empty bar in the style of all commands."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )


@contextmanager
def counted(description: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar of about ``total`` units; yield the function that advances it."""
    with progress_columns() as progress:
        progress.disable = quiet
        task = progress.add_task(description, total=total, status="")
        yield lambda amount: progress.update(task, advance=amount)
        progress.update(task, completed=total)
