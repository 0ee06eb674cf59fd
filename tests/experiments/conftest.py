"""A small data set in MNIST's format, and runs of the main job that take seconds."""

import gzip
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from dglm.chain import long_chain_log_joint
from experiments import report
from experiments.mnist import main


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let runs score with few temperatures; what is said of it is tested where the estimate is."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore:the log-likelihoods of"))


Arguments = Callable[..., list[str]]
Run = tuple[str, list[str], str, str]

KILLING = Path(__file__).with_name("killing.py")


@pytest.fixture(scope="session", autouse=True)
def short_long_chains() -> Iterator[None]:
    """Those of the report are half of the time of a run that takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "long_chain_log_joint", partial(long_chain_log_joint, num_steps=20))
        yield


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of ink at one of ten places, as gzipped IDX files in torchvision's layout."""
    root = tmp_path_factory.mktemp("datasets")
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", 400), ("t10k", 40)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = random.integers(0, 40, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 8, 8:20] = 230
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return root


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="session")
def checkpoint(root: Path, small: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small L2HMC-DGLM."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    main(small(folder))
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def small(root: Path) -> Arguments:
    """Return the arguments of a run that takes seconds, with changes: option=value."""

    def arguments(output: Path | None, **changes: object) -> list[str]:
        options: dict[str, object] = {
            "data.root": root,
            "data.batch_size": 20,
            "data.validation": 40,
            "model.latent_dim": 3,
            "model.hidden": "[12]",
            "model.num_mh_steps": 2,
            "model.num_leapfrogs": 2,
            "model.sampler_hidden": 8,
            "model.embedding_hidden": "[8]",
            "model.learning_rate": 0.002,
            "trainer.max_steps": 4,
            "trainer.val_check_interval": 2,
            "trainer.log_every_n_steps": 1,
            "trainer.accelerator": "cpu",
            "evaluation.num_images": 6,
            "evaluation.num_chains": 3,
            "evaluation.num_temperatures": 3,
            "evaluation.start": "prior",
            "evaluation.num_sweeps": 3,
            "quiet": "true",
        }
        if output is not None:
            options["output"] = output
        options.update({name.replace("__", "."): value for name, value in changes.items()})
        return [text for name, value in options.items() for text in (f"--{name}", str(value))]

    return arguments


@pytest.fixture
def configuration(small: Arguments, tmp_path: Path) -> Path:
    """The small model and data as a configuration of experiments.mnist."""
    given = small(None)
    content: dict[str, dict[str, object]] = {}
    for option, value in zip(given[::2], given[1::2], strict=True):
        section, _, name = option.removeprefix("--").partition(".")
        if section in ("model", "data", "trainer") and name not in ("max_steps", "root"):
            content.setdefault(section, {})[name] = yaml.safe_load(value)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="session")
def in_processes(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[list[Run]], tuple[list[int], str]]]:
    """Run commands, one after the other, in real processes that a signal ends.

    A run is the command, its arguments, the point at which the signal arrives, as killing.py calls
    it, and the signal. Returns the exit statuses, minus the signal where one ended the process, and
    what was written to stderr.
    """
    written = tmp_path_factory.mktemp("killing") / "stderr"
    command, pipe = [sys.executable, str(KILLING)], subprocess.PIPE
    with (
        written.open("w") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True) as process,
    ):

        def in_processes(runs: list[Run]) -> tuple[list[int], str]:
            assert process.stdin is not None
            assert process.stdout is not None
            before = len(written.read_text())
            print(json.dumps(runs), file=process.stdin, flush=True)
            for line in process.stdout:
                if line.startswith("statuses "):
                    return json.loads(line.removeprefix("statuses ")), written.read_text()[before:]
            raise AssertionError(written.read_text()[before:])

        yield in_processes
