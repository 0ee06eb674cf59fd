import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from data import DataError, ImageDataModule, Split, check_heldout

MakeRoot = Callable[..., Path]
Attach = Callable[..., ImageDataModule]
CODE_BITS = 10
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def indices_of(batch: Tensor) -> list[int]:
    """Return the indices of the images of ``make_root``, grey or binarized."""
    bits = (batch[:, :CODE_BITS] > 0).long()
    return (bits << torch.arange(CODE_BITS)).sum(dim=1).tolist()


class Recorder(LightningModule):
    """A model that keeps the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}

    def training_step(self, batch: Tensor) -> Tensor:
        self.batches["train"].append(batch)
        return self.weight * batch.mean()

    def validation_step(self, batch: Tensor) -> None:
        self.batches["validation"].append(batch)

    def test_step(self, batch: Tensor) -> None:
        self.batches["test"].append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(**arguments: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "num_sanity_val_steps": 0, "enable_checkpointing": False}
    return Trainer(**{**quiet, **defaults, **arguments})


def module(root: Path | str, **arguments: Any) -> ImageDataModule:
    return ImageDataModule(root=str(root), **{"batch_size": 10, "validation": 20, **arguments})


def test_splits_and_their_one_binarization(make_root: MakeRoot) -> None:
    root = make_root()
    images, other = module(root), module(root, seed=5, validation=0)
    images.setup()
    torch.manual_seed(5)
    other.setup("test")
    everything = other.heldout("train")

    assert images.dataset_name == "mnist"
    assert sorted(indices_of(everything)) == list(range(60))
    assert images.labels("validation").bincount().tolist() == [2] * 10
    for split in SPLITS:
        found = images.heldout(split)
        assert found.shape == ({"train": 40, "validation": 20, "test": 20}[split], 784)
        assert images.labels(split).tolist() == [index % 10 for index in indices_of(found)]
        kept = other.heldout("test") if split == "test" else everything[indices_of(found)]
        assert torch.equal(found, kept)
    assert set(everything.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("use_distributed_sampler", "validation"), [(True, 20), (False, 0)])
def test_a_trainer_sees_each_image_once_an_epoch(
    make_root: MakeRoot, use_distributed_sampler: bool, validation: int
) -> None:
    recorder, images = Recorder(), module(make_root(), validation=validation)
    options = {"use_distributed_sampler": use_distributed_sampler, "precision": "64-true"}
    trainer = make_trainer(max_epochs=3, limit_val_batches=1.0 if validation else 0, **options)
    trainer.fit(recorder, images)
    make_trainer(**options).test(recorder, images, verbose=False)

    batches, an_epoch = recorder.batches["train"], (60 - validation) // 10
    assert {(batch.shape, batch.dtype) for batch in batches} == {((10, 784), torch.float64)}
    epochs = [indices_of(torch.cat(batches[e * an_epoch :][:an_epoch])) for e in range(3)]
    assert all(sorted(epoch) == sorted(indices_of(images.heldout("train"))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert set(torch.cat(batches).unique().tolist()) == {0.0, 1.0}
    assert torch.equal(torch.cat(recorder.batches["test"]), images.heldout("test").double())
    if validation:
        seen = torch.cat(recorder.batches["validation"]).split(20)
        assert all(torch.equal(each, images.heldout("validation").double()) for each in seen)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_resumed_run_repeats_the_uninterrupted_one(
    make_root: MakeRoot, tmp_path: Path, step: int
) -> None:
    root, runs = make_root(), tmp_path / "runs"

    def fit(**arguments: Any) -> list[Tensor]:
        recorder = Recorder()
        save = ModelCheckpoint(runs, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(max_epochs=3, callbacks=[save], enable_checkpointing=True)
        trainer.fit(recorder, module(root), **arguments)
        return recorder.batches["train"]

    whole = fit()
    kept = (runs / f"step={step}.ckpt").rename(tmp_path / "kept.ckpt")
    shutil.rmtree(runs)
    resumed = fit(ckpt_path=kept)

    content = torch.load(kept, weights_only=True)
    assert content["ImageDataModule"] == {"dataset_name": "mnist", "validation": 20}
    assert len(whole) == 12
    assert torch.equal(torch.stack(resumed), torch.stack(whole[step:]))


def test_dynamic_binarization_is_a_function_of_seed_step_and_rank(
    make_root: MakeRoot, attach: Attach
) -> None:
    root = make_root()
    batch = torch.full((10, 784), 128, dtype=torch.uint8)

    def draw(seed: int = 0, step: int = 0, rank: int = 0) -> Tensor:
        images = attach(module(root, seed=seed), global_step=step, global_rank=rank)
        return images.on_after_batch_transfer(batch, 0)

    assert module(root).on_after_batch_transfer(batch, 0) is batch
    images = attach(module(root), training=False)
    assert images.on_after_batch_transfer(batch, 0) is batch
    draws = [draw(), draw(seed=1), draw(step=1), draw(rank=1)]
    assert torch.equal(draw(), draws[0])
    for index, one in enumerate(draws):
        assert one.dtype == torch.float32
        assert not any(torch.equal(one, other) for other in draws[:index])


def test_batches_that_one_update_accumulates_are_binarized_apart() -> None:
    recorder, grey = Recorder(), torch.full((60, 28, 28), 0.5)
    images = ImageDataModule.from_tensors(grey, batch_size=10, validation=10)
    make_trainer(max_epochs=2, accumulate_grad_batches=2).fit(recorder, images)
    batches = recorder.batches["train"]
    assert len(batches) == 8
    for index, one in enumerate(batches):
        assert not any(torch.equal(one, other) for other in batches[:index])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_have_disjoint_shares(
    make_root: MakeRoot, attach: Attach, world_size: int
) -> None:
    root, found = make_root(), []
    for rank in range(world_size):
        images = attach(module(root), global_rank=rank, world_size=world_size)
        images.setup()
        loaders = images.train_dataloader(), images.val_dataloader(), images.test_dataloader()
        found.append([indices_of(torch.cat(list(batches))) for batches in loaders])
    train, validation, test = ([*chain(*shares)] for shares in zip(*found, strict=True))
    assert len(train) == len(set(train)) == 40 // (10 * world_size) * world_size * 10
    assert sorted(validation) == sorted(indices_of(images.heldout("validation")))
    assert sorted(test) == list(range(20))


def test_mnist_5k_takes_the_place_of_mnist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README").touch()
    images = ImageDataModule(root=tmp_path)
    images.prepare_data()
    images.setup("fit")
    images.setup("test")
    images.prepare_data()
    ImageDataModule(root=str(tmp_path)).setup()

    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert "mnist-5k" in output
    assert str(tmp_path) in output
    assert images.dataset_name == "mnist-5k"
    counts: dict[Split, int] = {"train": 400, "validation": 50, "test": 50}
    for split, count in counts.items():
        assert images.labels(split).bincount().tolist() == [count] * 10
        assert images.heldout(split).shape == (10 * count, 784)


def test_a_process_other_than_the_first_is_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], attach: Attach
) -> None:
    np.save(tmp_path / "images.npy", np.eye(30, 16).reshape(30, 4, 4))
    for images in (
        ImageDataModule(root=tmp_path / "none"),
        ImageDataModule(tmp_path / "images.npy"),
    ):
        attach(images, global_rank=1, world_size=2).setup()
        assert images.dataset_name in ("mnist-5k", str(tmp_path / "images.npy"))
    assert capsys.readouterr().out == ""


def test_a_run_goes_on_with_its_own_data_only(
    make_root: MakeRoot, attach: Attach, tmp_path: Path
) -> None:
    root = make_root()
    state = {"dataset_name": "mnist", "validation": 20}
    fitting, testing = (SimpleNamespace(fn=fn) for fn in (TrainerFn.FITTING, TrainerFn.TESTING))
    images = attach(module(root), state=fitting)
    images.setup()
    assert images.state_dict() == state
    images.load_state_dict(state)
    for other in ({**state, "validation": 10}, {**state, "dataset_name": "kmnist"}):
        with pytest.raises(DataError, match="resume it with the same data"):
            images.load_state_dict(other)
    attach(images, state=testing).load_state_dict({**state, "dataset_name": "kmnist"})

    path, states = tmp_path / "images.pt", []
    for changed in (0, 0, 1):
        torch.save(torch.rand(40, 4, 6, generator=torch.Generator().manual_seed(changed)), path)
        own = attach(ImageDataModule(path), state=fitting)
        own.setup()
        states.append(own.state_dict())
    assert states[0] == states[1]
    assert states[0]["image_shape"] == [1, 4, 6]
    with pytest.raises(DataError, match="resume it with the same data"):
        own.load_state_dict(states[0])


def test_a_model_of_mnist_is_not_scored_on_mnist_5k() -> None:
    images = ImageDataModule("mnist-5k")
    images.setup()
    with pytest.raises(DataError, match="training images of mnist"):
        images.load_state_dict({"dataset_name": "mnist", "validation": 5000})
    images.load_state_dict({"dataset_name": "kmnist", "validation": 5000})
    check_heldout("mnist-5k", "mnist")
    check_heldout("mnist", "mnist")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet"}, "unknown data set"),
        ({"batch_size": 0}, "batch size must be a whole number, 1 or more, not 0"),
        ({"validation": -1}, "number of validation images must be a whole number, 0 or more"),
        ({"validation": 0.1}, "number of validation images must be a whole number, .* not 0.1"),
        ({"seed": -1}, "seed"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageDataModule(**arguments)


def test_what_comes_too_early_or_leaves_nothing(make_root: MakeRoot) -> None:
    images = module(make_root(), validation=None)
    with pytest.raises(DataError, match="call setup"):
        images.heldout("test")
    with pytest.raises(DataError, match="leave none of the 60 images"):
        images.setup()
