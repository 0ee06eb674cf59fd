"""Training and scoring of one model of the curve, each step by the command that is made for it."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from experiments.evaluate import Evaluate, evaluate
from experiments.likelihood_curve.options import LikelihoodCurve, Model, Split
from experiments.mnist import command_line, train
from experiments.saving import last_checkpoint
from samplers.files import write_whole


def train_model(options: LikelihoodCurve, model: Model, folder: Path) -> None:
    """Train a model, or go on with it; one that is trained already is left alone."""
    if (folder / "training.json").exists():
        return
    if last_checkpoint(folder).exists():
        arguments = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it saved any
        arguments = options.training_arguments(model, folder)
    cli = command_line(arguments)
    train(cli)
    dglm, data = cli.model, cli.datamodule
    updates = cli.trainer.global_step
    figures = {
        "training_images": len(data.labels("train")),
        "epochs": options.num_epochs,
        "updates": updates,
        "gradients_per_update": dglm.gradients_per_update,
        "training_gradient_evaluations": updates * dglm.gradients_per_update * data.batch_size,
    }
    write_whole(json.dumps(figures, indent=2) + "\n", folder / "training.json")
    torch.compiler.reset()  # the next model is another, and the compiler keeps few


def score_model(options: LikelihoodCurve, folder: Path, split: Split) -> None:
    """Score a trained model; a score that is there already stays."""
    output = folder / f"{split}.json"
    if output.exists():
        return
    evaluate(
        Evaluate(
            checkpoint=str(last_checkpoint(folder)),
            split=split,
            num_images=options.num_images,
            data=options.data,
            output=str(output),
            quiet=options.quiet,
            **asdict(options.scoring),
        )
    )
