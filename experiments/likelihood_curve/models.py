"""Training and scoring of one model of the curve, each step by the command that is made for it."""

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from experiments.compilation import images_per_update
from experiments.evaluate import Evaluate, TrainerOptions, evaluate
from experiments.heldout import DataOptions, check_split
from experiments.json_files import write_json
from experiments.likelihood_curve.options import LikelihoodCurve, Model, Split
from experiments.mnist import command_line, train
from experiments.saving import last_checkpoint


def check_splits(options: LikelihoodCurve) -> None:
    """Raise DataError, before anything is trained, where a split to score has no images."""
    with tempfile.TemporaryDirectory() as folder:
        model = options.models()[0]
        data = command_line(options.training_arguments(model, Path(folder) / "model")).datamodule
    data.setup()
    for split in options.splits:
        check_split(data, split)


def train_model(options: LikelihoodCurve, model: Model, folder: Path) -> None:
    """Train a model, or go on with it; one that is trained already is left alone."""
    if (folder / "training.json").exists():
        return
    if last_checkpoint(folder).exists():
        arguments = ["--resume", str(folder), *options.data_arguments()]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it saved any
        arguments = options.training_arguments(model, folder)
    cli = command_line(arguments)
    train(cli)
    dglm, data = cli.model, cli.datamodule
    updates, images = cli.trainer.global_step, images_per_update(cli.trainer, data)
    figures = {
        "training_images": len(data.labels("train")),
        "epochs": options.num_epochs,
        "updates": updates,
        "gradients_per_update": dglm.gradients_per_update,
        "training_gradient_evaluations": updates * images * dglm.gradients_per_update,
    }
    write_json(figures, folder / "training.json")
    torch.compiler.reset()  # the next model may be of other sizes


def score_model(options: LikelihoodCurve, folder: Path, split: Split) -> None:
    """Score a trained model on the data of its training; a score that is there already stays."""
    output = folder / f"{split}.json"
    if output.exists():
        return
    trained = yaml.safe_load((folder / "config.yaml").read_text())
    evaluate(
        Evaluate(
            checkpoint=str(last_checkpoint(folder)),
            split=split,
            num_images=options.num_images,
            data=DataOptions(root=options.data.root or trained["data"]["root"]),
            trainer=TrainerOptions(devices=1),
            output=str(output),
            quiet=options.quiet,
            **asdict(options.scoring),
        )
    )
