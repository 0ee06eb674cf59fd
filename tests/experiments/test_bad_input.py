"""Bad input to any command: one line that names the culprit, and nothing is written."""

import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.shared.cli import run_command

Arguments = Callable[..., list[str]]
Options = dict[str, Any]

IMAGES = "train-images-idx3-ubyte.gz"


@dataclass
class Place:
    """Where a row of the table finds and writes its files."""

    folder: Path
    root: Path
    checkpoint: Path

    def written(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def data(self, change: Callable[[bytes], bytes]) -> Options:
        """Return the option of a copy of the data set in which the images' file is changed."""
        raw = self.folder / "datasets" / "MNIST" / "raw"
        shutil.copytree(self.root / "MNIST" / "raw", raw)
        (raw / IMAGES).write_bytes(change((raw / IMAGES).read_bytes()))
        return {"data.root": self.folder / "datasets"}

    def saved(self, change: Callable[[dict[str, Any]], object]) -> Options:
        """Return the option of a copy of the checkpoint whose content is changed."""
        content = torch.load(self.checkpoint, weights_only=True)
        change(content)
        torch.save(content, self.folder / "strange.ckpt")
        return {"checkpoint": self.folder / "strange.ckpt"}

    def run(self, change: Callable[[bytes], bytes] = lambda content: content) -> Path:
        """Return a copy of the run folder with the checkpoint's bytes changed."""
        run = self.folder / "trained"
        shutil.copytree(self.checkpoint.parents[1], run)
        last = run / "checkpoints" / "last.ckpt"
        last.write_bytes(change(last.read_bytes()))
        return run

    def files(self) -> dict[Path, bytes | None]:
        paths = self.folder.rglob("*")
        return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def place(root: Path, checkpoint: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, root, checkpoint)


class Exploit:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def exploit(place: Place) -> Path:
    path = place.folder / "unsafe.ckpt"
    torch.save({"state_dict": Exploit(place.folder / "executed")}, path)
    return path


def flip(content: bytes, place: int | None = None) -> bytes:
    """Flip one bit, by default in the middle."""
    place = len(content) // 2 if place is None else place
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def inside(checkpoint: Path) -> int:
    """Return a place in the largest tensor: between tensors are bytes that mean nothing."""
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda each: each.file_size)
    return largest.header_offset + largest.file_size


def other_encoder(content: dict[str, Any]) -> None:
    content["hyper_parameters"]["encoder"] = {"class_path": "os.system", "init_args": {}}


def other_size(content: dict[str, Any]) -> None:
    content["hyper_parameters"]["encoder"]["init_args"]["latent_dim"] = 7


def nan_weight(content: dict[str, Any]) -> None:
    content["state_dict"]["model.decoder.output.bias"][3] = torch.nan


AVERAGING = '[{"class_path": "StochasticWeightAveraging", "init_args": {"swa_lrs": 0.001}}]'
EARLY_STOPPING = '[{"class_path": "EarlyStopping", "init_args": {"monitor": "%s"}}]'

# One row for each place where an option is looked at; data files, networks and counts have tables
# of their own where they are refused.
OPTIONS: list[tuple[str, str, object, str]] = [
    ("mnist", "data.name", "imagenet", "imagenet"),
    ("mnist", "data.batch_size", 0, "batch size"),
    ("mnist", "data.batch_size", 500, "500"),
    ("mnist", "data.validation", -1, "validation"),
    ("mnist", "data.validation", 400, "400 validation images"),
    ("mnist", "config", "no_such_config", "no_such_config"),
    ("mnist", "kernel", "gibbs", "gibbs"),
    ("mnist", "model.latent_dim", 0, "latent_dim"),
    ("mnist", "model.num_mh_steps", 0, "num_mh_steps"),
    ("mnist", "model.step_size", "nan", "step_size"),
    ("mnist", "model.embedding_hidden", "[0]", "embedding_hidden"),
    ("mnist", "model.learning_rate", "nan", "learning_rate"),
    ("mnist", "model.learning_rate", -1, "learning rate"),
    ("mnist", "model.channels", "[4, 4, 4]", "multiples of 8"),
    ("mnist", "model.likelihood", "poisson", "poisson"),
    ("mnist", "trainer.max_steps", "many", "many"),
    ("mnist", "trainer.max_steps", -5, "max_steps"),
    ("mnist", "trainer.devices", 0, "devices"),
    ("mnist", "trainer.accelerator", "abacus", "abacus"),
    ("mnist", "trainer.strategy", "hope", "hope"),
    ("mnist", "trainer.default_root_dir", "elsewhere", "choose --output"),
    ("mnist", "trainer.enable_checkpointing", "false", "could not go on"),
    ("mnist", "trainer.use_distributed_sampler", "true", "its own share"),
    ("mnist", "trainer.limit_test_batches", 1, "choose --evaluation.num_images"),
    ("mnist", "trainer.overfit_batches", 2, "few images of your own"),
    ("mnist", "trainer.gradient_clip_val", 1, "would be ignored"),
    ("mnist", "trainer.precision", "bf16-true", "too low for exact chains"),
    ("mnist", "trainer.callbacks", EARLY_STOPPING % "val_loss", "waits for val_loss, which is not"),
    ("mnist", "trainer.callbacks", EARLY_STOPPING % "validation/log_elbo", "more is better"),
    ("mnist", "trainer.callbacks", '[{"class_path": "Timer"}]', "config.yaml cannot hold"),
    ("mnist", "trainer.callbacks", AVERAGING, "take EMAWeightAveraging"),
    ("mnist", "trainer.max_steps", 0, "trains nothing"),
    ("mnist", "trainer.limit_train_batches", 0, "trains nothing"),
    ("mnist", "model.noise_scale", 0.5, "noise_scale is of gaussian pixels"),
    ("mnist", "model.jump_scale", 2, "jump_scale 2.0 would be ignored"),
    ("mnist", "model.likelihood", "gaussian", "add --data.binarize false"),
    ("mnist", "seed", -1, "seed"),
    ("mnist", "evaluation.num_images", 0, "num_images"),
    ("mnist", "evaluation.num_chains", 1, "num_chains"),
    ("mnist", "evaluation.num_sweeps", 0, "num_sweeps"),
    ("mnist", "resume", "no_such_run", "no_such_run"),
    ("evaluate", "checkpoint", "no_such.ckpt", "no_such.ckpt"),
    ("evaluate", "data.name", "mnist-5k", "mnist-5k"),
    ("evaluate", "data.name", "imagenet", "imagenet"),
    ("evaluate", "split", "both", "both"),
    ("evaluate", "num_leapfrogs", -2, "num_leapfrogs"),
    ("evaluate", "num_images", 1, "num_images"),
    ("evaluate", "batch_size", 0, "batch_size"),
    ("evaluate", "iwae_samples", -1, "iwae_samples"),
    ("evaluate", "curve", "10,many", "curve"),
    ("evaluate", "curve", "10,20", "leave num_temperatures out"),
    ("evaluate", "curve", "0,10", "num_temperatures"),
    ("evaluate", "start", "posterior", "posterior"),
    ("likelihood_curve", "start", "coordinates", "not for a VAE"),
    ("evaluate", "seed", -1, "seed"),
    ("evaluate", "output", "result.txt", "result.txt"),
    ("evaluate", "bdmc_images", 7, "bdmc_images is of bdmc true"),
    ("evaluate", "num_chians", 3, "num_chians"),
    ("inpaint", "mask", "middle", "middle"),
    ("inpaint", "sweeps", 1, "sweeps"),
    ("posterior", "image", 4000, "4000"),
    ("posterior", "search", 4000, "4000"),
    ("posterior", "search", 0, "search"),
    ("posterior", "num_leapfrogs", -1, "num_leapfrogs"),
    ("posterior", "num_chains", 1, "num_chains"),
    ("targets", "target", "mobius", "mobius"),
    ("targets", "num_chains", 0, "num_chains must be at least 20"),
    ("targets", "num_steps", 3, "num_steps must be at least"),
    ("targets", "budget", 3, "budget must be at least"),
    ("targets", "seed", -1, "seed must not be negative"),
    ("targets", "colour", "red", "colour"),
    ("targets", "resume", "nowhere", "nowhere"),
    ("likelihood_curve", "num_mh_steps", "[0]", "num_mh_steps must be at least 1"),
    ("likelihood_curve", "num_mh_steps", "[]", "num_mh_steps must name at least one"),
    ("likelihood_curve", "seeds", "[-1]", "seeds must be 0 or more"),
    ("likelihood_curve", "num_epochs", 0, "num_epochs must be at least 1"),
    ("likelihood_curve", "splits", "[holiday]", "splits"),
    ("likelihood_curve", "training", "no-such-file.yaml", "no-such-file.yaml"),
    ("quality", "models", "[]", "models must name at least one"),
    ("quality", "models", "[nuts]", "nuts"),
    ("quality", "training", "no-such-file.yaml", "no-such-file.yaml"),
    ("quality", "shares", "[0.00001]", "share 1e-05 of vae is no update"),
]

Prepare = Callable[[Place], Options]
Row = tuple[str, Prepare, str]


def option(command: str, name: str, value: object, named: str) -> Row:
    return command, lambda place: {name: value}, named


def rows(command: str, what: str, table: dict[str, tuple[Prepare, str]]) -> dict[str, Row]:
    return {f"{what}, {name}": (command, *row) for name, row in table.items()}


def resumed(change: Callable[[Place, bytes], bytes], **options: object) -> Prepare:
    changes = {name.replace("__", "."): value for name, value in options.items()}
    return lambda p: {"resume": p.run(lambda content: change(p, content)), **changes}


def same(place: Place, content: bytes) -> bytes:
    return content


def loaded(content: Callable[[Place], bytes | str]) -> Prepare:
    return lambda p: {"checkpoint": p.written("strange.ckpt", content(p))}


def saved(change: Callable[[dict[str, Any]], object]) -> Prepare:
    return lambda p: p.saved(change)


def bare_list(place: Place) -> Options:
    torch.save([1], place.folder / "strange.ckpt")
    return {"checkpoint": place.folder / "strange.ckpt"}


def without_validation(place: Place) -> Options:
    changed = place.saved(lambda content: content["ImageDataModule"].update(validation=0))
    return {**changed, "split": "validation"}


GAUSSIAN = {"model.likelihood": "gaussian", "model.noise_scale": 0, "data.binarize": "false"}
CONFIGURATIONS = {
    "modle: 3": "modle",
    "data: {size: 3}": "size",
    "seed: many": "seed",
    "seed: [1,": "c.yaml",
    "- 1": "c.yaml",
    b"\xff\0": "c.yaml",
}
NO_CHECKPOINT, STRANGE = "last.ckpt is not a checkpoint", "strange.ckpt"
OF_FILES: dict[str, tuple[Prepare, str]] = {
    "empty": (loaded(lambda p: ""), STRANGE),
    "text": (loaded(lambda p: "hello"), STRANGE),
    "zip header": (loaded(lambda p: b"PK\3\4"), STRANGE),
    "truncated": (loaded(lambda p: p.checkpoint.read_bytes()[:20_000]), STRANGE),
    "flipped bit": (
        loaded(lambda p: flip(p.checkpoint.read_bytes(), inside(p.checkpoint))),
        STRANGE,
    ),
    "unsafe": (lambda p: {"checkpoint": exploit(p)}, "more than plain data"),
    "folder": (lambda p: {"checkpoint": p.folder}, "no checkpoint"),
    "list": (bare_list, STRANGE),
    "no networks": (saved(lambda content: content.pop("hyper_parameters")), STRANGE),
    "no weights": (saved(lambda content: content.pop("state_dict")), STRANGE),
    "no module": (saved(other_encoder), "os.system"),
    "other sizes": (saved(other_size), STRANGE),
    "NaN": (saved(nan_weight), STRANGE),
    "split without images": (without_validation, "there are no validation images of mnist"),
    "result that is there": (lambda p: {"output": p.written("r.json", "mine")}, "r.json exists"),
    "result in a file": (lambda p: {"output": p.written("f", "") / "r.json"}, "f"),
}
WITHOUT_VALIDATION = {
    "data.validation": 0,
    "trainer.callbacks": EARLY_STOPPING % "validation/log_elbo",
}
OF_RUNS: dict[str, tuple[Prepare, str]] = {
    "flipped bit in the data": (lambda p: p.data(flip), f"{IMAGES} is damaged"),
    "empty data": (lambda p: p.data(lambda content: b""), f"{IMAGES} is empty"),
    "no noise": (lambda p: GAUSSIAN, "positive number, got 0"),
    "folder for a configuration": (lambda p: {"config": p.folder}, "config"),
    "there": (lambda p: {"output": p.written("run/mine", "precious").parent}, "run exists"),
    "file": (lambda p: {"output": p.written("file", "mine")}, "file exists"),
    "in a file": (lambda p: {"output": p.written("file", "") / "run"}, "file"),
    "no checkpoint": (
        lambda p: {"resume": p.written("old/config.yaml", "seed: 0").parent},
        "old/checkpoints/last.ckpt",
    ),
    "truncated": (resumed(lambda p, content: content[: len(content) // 2]), NO_CHECKPOINT),
    "empty": (resumed(lambda p, content: b""), NO_CHECKPOINT),
    "unsafe": (resumed(lambda p, content: exploit(p).read_bytes()), NO_CHECKPOINT),
    "other size": (resumed(same, model__latent_dim=4), "latent_dim"),
    "other kernel": (resumed(same, kernel="hmc"), "kernel"),
    "other data": (resumed(same, data__validation=20), "same data"),
    "resumed elsewhere": (resumed(same, output="elsewhere"), "leave --output out"),
    "metric of no validation": (lambda p: WITHOUT_VALIDATION, "is not logged"),
}
ROWS: dict[str, Row] = {
    **{" ".join(map(str, row[:3])): option(*row) for row in OPTIONS},
    **{
        f"configuration {content!r}": (
            "mnist",
            lambda p, content=content: {"config": p.written("c.yaml", content)},
            named,
        )
        for content, named in CONFIGURATIONS.items()
    },
    **rows("mnist", "run", OF_RUNS),
    **rows("evaluate", "file", OF_FILES),
    "steps of q": (
        "inpaint",
        lambda p: {"posterior": "encoder", "steps_per_sweep": 2},
        "steps_per_sweep is of the kernel",
    ),
    "coordinates of a VAE": (
        "mnist",
        lambda p: {"kernel": "none", "evaluation.start": "coordinates"},
        "no coordinates to start at",
    ),
    "image and search": ("posterior", lambda p: {"image": 1, "search": 3}, "search chooses the"),
    "picture": ("samples", lambda p: {"output": p.written("x.png", "precious")}, "x.png exists"),
}


def arguments(command: str, changes: Options, place: Place, small: Arguments) -> list[str]:
    """Return those of a run that would take seconds, with changes."""
    if command == "mnist":
        output = None if "resume" in changes else place.folder / "run"
        return small(**{"output": output, **changes})
    trained = {"checkpoint": place.checkpoint, "data.root": place.root}
    sizes = {"num_images": 4, "num_chains": 2, "num_temperatures": 2, "start": "prior"}
    options: Options = {
        "evaluate": {
            **trained,
            **sizes,
            "trainer.accelerator": "cpu",
            "quiet": "true",
            "output": place.folder / "result.json",
        },
        "inpaint": {**trained, "output": place.folder / "x.png"},
        "posterior": {**trained, "output": place.folder / "x.png"},
        "samples": {"checkpoints": place.checkpoint},
        "targets": {} if "resume" in changes else {"target": "scg"},
        "likelihood_curve": {"output": place.folder / "curve"},
        "quality": {"output": place.folder / "quality"},
    }[command]
    return [
        text for name, value in (options | changes).items() for text in (f"--{name}", str(value))
    ]


def module(command: str) -> str:
    folder = command in ("targets", "likelihood_curve")
    return f"experiments.{command}.__main__" if folder else f"experiments.{command}"


@pytest.mark.parametrize(("command", "prepare", "named"), ROWS.values(), ids=ROWS)
def test_bad_input_is_one_line_and_nothing_is_written(
    command: str,
    prepare: Callable[[Place], Options],
    named: str,
    place: Place,
    small: Arguments,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place.folder)
    given = arguments(command, prepare(place), place, small)
    before, main = place.files(), import_module(module(command)).main
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: main(given))
    message = stopped.value.code
    assert isinstance(message, str)  # a string is printed to stderr and gives exit status 1
    assert message.startswith("error: ")
    assert "\n" not in message
    assert named in message
    assert place.files() == before
