"""Bad input to the commands: one line that names the culprit, and nothing is overwritten."""

import gzip
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import evaluate, mnist
from experiments.shared.cli import run_command

Arguments = Callable[..., list[str]]
Options = dict[str, Any]

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


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

    def data(self, name: str, change: Callable[[bytes], bytes]) -> Options:
        """Return the option of a copy of the data set in which one file is changed."""
        raw = self.folder / "datasets" / "MNIST" / "raw"
        shutil.copytree(self.root / "MNIST" / "raw", raw)
        (raw / name).write_bytes(change((raw / name).read_bytes()))
        return {"data.root": self.folder / "datasets"}

    def file(self, name: str) -> bytes:
        return (self.root / "MNIST" / "raw" / name).read_bytes()

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

    def files(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


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


def flip(content: bytes) -> bytes:
    """Flip one bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def idx(type_code: int, *shape: int) -> bytes:
    size = {0x08: 1, 0x0D: 4}[type_code]
    count = size * int(torch.tensor(shape).prod())
    return struct.pack(f">HBB{len(shape)}I", 0, type_code, len(shape), *shape) + bytes(count)


def other_encoder(content: dict[str, Any]) -> None:
    content["hyper_parameters"]["encoder"] = {"class_path": "os.system", "init_args": {}}


def other_size(content: dict[str, Any]) -> None:
    content["hyper_parameters"]["encoder"]["init_args"]["latent_dim"] = 7


def nan_weight(content: dict[str, Any]) -> None:
    content["state_dict"]["model.decoder.output.bias"][3] = torch.nan


Row = tuple[Callable[[Place], Options], str]


def option(name: str, value: object, named: str) -> Row:
    return lambda place: {name: value}, named


TRAINING: dict[str, Row] = {
    # Data
    "truncated images": (lambda p: p.data(IMAGES, lambda b: b[:1000]), f"{IMAGES} is truncated"),
    "truncated labels": (lambda p: p.data(LABELS, lambda b: b[:-9]), f"{LABELS} is truncated"),
    "empty images": (lambda p: p.data(IMAGES, lambda b: b""), f"{IMAGES} is empty"),
    "empty labels": (lambda p: p.data(LABELS, lambda b: b""), f"{LABELS} is empty"),
    "flipped bit": (lambda p: p.data(IMAGES, flip), f"{IMAGES} is damaged"),
    "labels as images": (
        lambda p: p.data(IMAGES, lambda b: p.file(LABELS)),
        f"{IMAGES} holds labels, not images",
    ),
    "images as labels": (
        lambda p: p.data(LABELS, lambda b: p.file(IMAGES)),
        f"{LABELS} holds images, not labels",
    ),
    "test labels as training labels": (
        lambda p: p.data(LABELS, lambda b: p.file("t10k-labels-idx1-ubyte.gz")),
        "has 40 labels for the 400 images",
    ),
    "test images as training images": (
        lambda p: p.data(IMAGES, lambda b: p.file("t10k-images-idx3-ubyte.gz")),
        "has 400 labels for the 40 images",
    ),
    "small images": (lambda p: p.data(IMAGES, lambda b: idx(8, 400, 14, 14)), "14 x 14"),
    "images of floats": (lambda p: p.data(IMAGES, lambda b: idx(13, 400, 28, 28)), "no IDX file"),
    "no images at all": (lambda p: p.data(IMAGES, lambda b: idx(8, 0, 28, 28)), "no images"),
    "a header alone": (lambda p: p.data(IMAGES, lambda b: gzip.decompress(b)[:6]), "truncated"),
    "a web page": (lambda p: p.data(IMAGES, lambda b: b"<!DOCTYPE html>"), "no IDX file"),
    "unknown data set": option("data.name", "imagenet", "imagenet"),
    "batch of none": option("data.batch_size", 0, "batch size"),
    "batch beyond the data": option("data.batch_size", 500, "500"),
    "negative validation": option("data.validation", -1, "validation"),
    "nothing but validation": option("data.validation", 400, "400 validation images"),
    # Configurations
    "no such configuration": option("config", "no_such_config", "no_such_config"),
    "unknown key": (lambda p: {"config": p.written("c.yaml", "modle: 3")}, "modle"),
    "unknown nested key": (lambda p: {"config": p.written("c.yaml", "data: {size: 3}")}, "size"),
    "wrong type": (lambda p: {"config": p.written("c.yaml", "seed: many")}, "seed"),
    "broken YAML": (lambda p: {"config": p.written("c.yaml", "seed: [1,")}, "c.yaml"),
    "a list for a configuration": (lambda p: {"config": p.written("c.yaml", "- 1")}, "c.yaml"),
    "binary configuration": (lambda p: {"config": p.written("c.yaml", b"\xff\0")}, "c.yaml"),
    "folder for a configuration": (lambda p: {"config": p.folder}, "config"),
    # Model
    "unknown kernel": option("kernel", "gibbs", "gibbs"),
    "no latent variables": option("model.latent_dim", 0, "latent_dim"),
    "negative latent variables": option("model.latent_dim", -3, "latent_dim"),
    "no hidden layer": option("model.hidden", "[]", "hidden"),
    "empty hidden layer": option("model.hidden", "[0]", "hidden"),
    "J = 0": option("model.num_mh_steps", 0, "num_mh_steps"),
    "M = 0": option("model.num_leapfrogs", 0, "num_leapfrogs"),
    "negative step size": option("model.step_size", -1, "step_size"),
    "step size NaN": option("model.step_size", "nan", "step_size"),
    "empty sampler": option("model.sampler_hidden", 0, "hidden"),
    "empty embedding": option("model.embedding_hidden", "[0]", "embedding_hidden"),
    "learning rate NaN": option("model.learning_rate", "nan", "learning_rate"),
    "negative learning rate": option("model.learning_rate", -1, "learning rate"),
    # Training and evaluation
    "steps that are no number": option("trainer.max_steps", "many", "many"),
    "negative steps": option("trainer.max_steps", -5, "max_steps"),
    "no devices": option("trainer.devices", 0, "devices"),
    "unknown accelerator": option("trainer.accelerator", "abacus", "abacus"),
    "unknown strategy": option("trainer.strategy", "hope", "hope"),
    "negative seed": option("seed", -1, "seed"),
    "no test images": option("evaluation.num_images", 0, "num_images"),
    "one chain": option("evaluation.num_chains", 1, "num_chains"),
    "no temperatures": option("evaluation.num_temperatures", 0, "num_temperatures"),
    "no leapfrogs": option("evaluation.num_leapfrogs", 0, "num_leapfrogs"),
    "no sweeps": option("evaluation.num_sweeps", 0, "num_sweeps"),
    # Run folders
    "existing run": (lambda p: {"output": p.written("run/mine", "precious").parent}, "run exists"),
    "file for a run": (lambda p: {"output": p.written("file", "mine")}, "file exists"),
    "run that cannot be made": (lambda p: {"output": p.written("file", "") / "run"}, "file"),
    "no such run": option("resume", "no_such_run", "no_such_run"),
    "run without checkpoint": (
        lambda p: {"resume": p.written("old/config.yaml", "seed: 0").parent},
        "old/checkpoints/last.ckpt",
    ),
    "run with a truncated checkpoint": (
        lambda p: {"resume": p.run(lambda b: b[: len(b) // 2])},
        "last.ckpt is not a checkpoint",
    ),
    "run with an empty checkpoint": (
        lambda p: {"resume": p.run(lambda b: b"")},
        "last.ckpt is not a checkpoint",
    ),
    "run with an unsafe checkpoint": (
        lambda p: {"resume": p.run(lambda b: exploit(p).read_bytes())},
        "last.ckpt is not a checkpoint",
    ),
    "run of another latent size": (
        lambda p: {"resume": p.run(), "model.latent_dim": 4},
        "latent_dim",
    ),
    "run of another kernel": (lambda p: {"resume": p.run(), "kernel": "hmc"}, "kernel"),
    "run on other data": (lambda p: {"resume": p.run(), "data.validation": 20}, "same data"),
}

VALIDATION: Options = {"split": "validation"}

SCORING: dict[str, Row] = {
    "no such checkpoint": option("checkpoint", "no_such.ckpt", "no_such.ckpt"),
    "folder for a checkpoint": (lambda p: {"checkpoint": p.folder}, "no checkpoint"),
    "empty checkpoint": (lambda p: {"checkpoint": p.written("strange.ckpt", "")}, "strange.ckpt"),
    "text": (lambda p: {"checkpoint": p.written("strange.ckpt", "hello")}, "strange.ckpt"),
    "zip header": (lambda p: {"checkpoint": p.written("s.ckpt", b"PK\3\4")}, "s.ckpt"),
    "truncated checkpoint": (
        lambda p: {"checkpoint": p.written("s.ckpt", p.checkpoint.read_bytes()[:20_000])},
        "s.ckpt",
    ),
    "flipped bit in a checkpoint": (
        lambda p: {"checkpoint": p.written("s.ckpt", flip(p.checkpoint.read_bytes()))},
        "s.ckpt",
    ),
    "unsafe pickle": (lambda p: {"checkpoint": exploit(p)}, "more than plain data"),
    "weights alone": (lambda p: p.saved(lambda c: c.pop("hyper_parameters")), "strange.ckpt"),
    "no weights": (lambda p: p.saved(lambda c: c.pop("state_dict")), "strange.ckpt"),
    "class that is no module": (lambda p: p.saved(other_encoder), "os.system"),
    "another latent size": (lambda p: p.saved(other_size), "strange.ckpt"),
    "weights NaN": (lambda p: p.saved(nan_weight), "strange.ckpt"),
    "a bare list": (
        lambda p: {"checkpoint": (torch.save([1], p.folder / "s.ckpt"), p.folder / "s.ckpt")[1]},
        "s.ckpt",
    ),
    "digits seen in training": option("data.name", "mnist-5k", "mnist-5k"),
    "unknown data set": option("data.name", "imagenet", "imagenet"),
    "split without images": (
        lambda p: {**p.saved(lambda c: c["ImageDataModule"].update(validation=0)), **VALIDATION},
        "there are no validation images of mnist",
    ),
    "unknown split": option("split", "both", "both"),
    "no chains": option("num_chains", 0, "num_chains"),
    "no temperatures": option("num_temperatures", 0, "num_temperatures"),
    "negative leapfrogs": option("num_leapfrogs", -2, "num_leapfrogs"),
    "one image": option("num_images", 1, "num_images"),
    "batch of none": option("batch_size", 0, "batch_size"),
    "negative samples": option("iwae_samples", -1, "iwae_samples"),
    "curve of words": option("curve", "10,many", "curve"),
    "curve of zero": option("curve", "0,10", "num_temperatures"),
    "unknown start": option("start", "posterior", "posterior"),
    "negative seed": option("seed", -1, "seed"),
    "result that is no JSON": option("output", "result.txt", "result.txt"),
    "existing result": (lambda p: {"output": p.written("r.json", "precious")}, "r.json exists"),
    "result in a file": (lambda p: {"output": p.written("file", "") / "r.json"}, "file"),
    "unknown option": option("num_chians", 3, "num_chians"),
}


def scoring(place: Place) -> Options:
    return {
        "checkpoint": place.checkpoint,
        "data.root": place.root,
        "num_images": 4,
        "num_chains": 2,
        "num_temperatures": 2,
        "start": "prior",
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "quiet": "true",
        "output": place.folder / "result.json",
    }


def texts(options: Options) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def refusal(main: Callable[[list[str]], None], arguments: list[str]) -> str:
    """Run the command, which must refuse in one line; return the line."""
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: main(arguments))
    message = stopped.value.code
    assert isinstance(message, str)  # a string is printed to stderr and gives exit status 1
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("prepare", "named"), TRAINING.values(), ids=TRAINING.keys())
def test_training_refuses(
    prepare: Callable[[Place], Options], named: str, place: Place, small: Arguments
) -> None:
    changes = prepare(place)
    before = place.files()
    output = None if "resume" in changes else place.folder / "run"
    message = refusal(mnist.main, small(**{"output": output, **changes}))
    assert named in message
    assert place.files() == before


@pytest.mark.parametrize(("prepare", "named"), SCORING.values(), ids=SCORING.keys())
def test_evaluation_refuses(prepare: Callable[[Place], Options], named: str, place: Place) -> None:
    changes = prepare(place)
    before = place.files()
    message = refusal(evaluate.main, texts({**scoring(place), **changes}))
    assert named in message
    assert place.files() == before


def test_commands_refuse_as_processes(place: Place, small: Arguments) -> None:
    prepare, named = TRAINING["flipped bit"]
    given = small(**{"output": place.folder / "run", **prepare(place)})
    check_process("experiments.mnist", given, named, place)
    prepare, named = SCORING["unsafe pickle"]
    given = texts({**scoring(place), **prepare(place)})
    check_process("experiments.evaluate", given, named, place)


def check_process(module: str, arguments: list[str], named: str, place: Place) -> None:
    before = place.files()
    command = [sys.executable, "-m", module, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
    assert finished.stderr.count("\n") == 1
    assert named in finished.stderr
    assert place.files() == before
