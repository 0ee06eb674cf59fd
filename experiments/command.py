"""What the commands share: shipped configurations, run folders, one-line errors."""

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from data import DataError

CONFIGS = Path(__file__).parent / "configs"


class CommandError(Exception):
    """Something that the user of a command can put right."""


class ConfigFile(ActionConfigFile):
    """The option --config: a configuration file, or the name of one that the package ships."""

    def __call__(self, parser: Any, config: Any, values: Any, option: str | None = None) -> None:
        """Read the file into the configuration."""
        shipped = CONFIGS / f"{values}.yaml"
        if isinstance(values, str) and not Path(values).exists() and shipped.exists():
            values = str(shipped)
        super().__call__(parser, config, values, option)


def run_command(main: Callable[[], None]) -> None:
    """Run a command; turn what the user can put right into one line and exit status 1."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A run folder holds more than the logs, and nothing that a run wrote is deleted.
    warnings.filterwarnings("ignore", ".*directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning's own
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (
        ArgumentError,
        CommandError,
        DataError,
        MisconfigurationException,
        OSError,
        ValueError,
    ) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def create_run(output: str | None, prefix: str) -> Path:
    """Create the folder of a run: ``output``, or the first free runs/PREFIX-001, -002, ….

    Raises:
        CommandError: The folder exists and is not empty, or cannot be created.
    """
    try:
        if output is not None:
            folder = Path(output)
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise CommandError(
                    f"{folder} exists already; choose another --output, or --resume {folder}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints").mkdir()
            return folder
        number = 1
        while True:
            folder = Path("runs") / f"{prefix}-{number:03d}"
            try:
                (folder / "checkpoints").mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise CommandError(
            f"cannot create the run folder: {error.strerror} ({error.filename}); choose --output"
        ) from error


def resumed_arguments(arguments: list[str]) -> list[str]:
    """Put the configuration of a run that is resumed before the other arguments.

    Raises:
        CommandError: --resume names no folder with a config.yaml.
    """
    for index, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option == "--resume":
            folder = value or " ".join(arguments[index + 1 : index + 2])
            config = Path(folder) / "config.yaml"
            if not config.is_file():
                raise CommandError(f"--resume {folder}: there is no {config}; name a run folder")
            return ["--config", str(config), *arguments]
    return arguments
