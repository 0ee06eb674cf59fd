"""The models of the curve: options and arguments."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dglm.annealing import check_counts
from experiments.shared.models import KernelName
from experiments.shared.trainings import Split, Trainings


class Model(NamedTuple):
    """A model of the curve."""

    kernel: KernelName
    num_mh_steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder; a VAE takes no steps."""
        steps = "" if self.kernel == "none" else f"-{self.num_mh_steps}"
        return f"{self.kernel}{steps}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class LikelihoodCurve(Trainings):
    """What is trained and how it is scored.

    Args:
        num_mh_steps: Metropolis-Hastings steps of an update: a model of each kernel for each.
        num_epochs: Passes over the training images.
        splits: Which images are scored. Choose with validation, score the test set once.
        dry_run: Print what it would cost, by timing a few updates of each model, and stop.
    """

    num_mh_steps: list[int] = field(default_factory=lambda: [1, 2, 5, 7])
    num_epochs: int = 15
    splits: list[Split] = field(default_factory=lambda: ["train", "test"])
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError where a number is out of range, or a list is empty."""
        super().__post_init__()
        check_counts(num_epochs=self.num_epochs)
        self.check_some("num_mh_steps")
        self.check_some("splits")
        if min(self.num_mh_steps) < 1:
            raise ValueError(f"num_mh_steps must be at least 1, got {min(self.num_mh_steps)}")

    def models(self) -> list[Model]:
        """Return the models, seed by seed, the cheapest first."""
        steps = sorted(set(self.num_mh_steps))
        return [
            model
            for seed in dict.fromkeys(self.seeds)
            for model in [
                Model("none", 1, seed),
                *(Model("hmc", count, seed) for count in steps),
                *(Model("l2hmc", count, seed) for count in steps),
            ]
        ]

    def training_arguments(self, model: Model, folder: Path) -> list[str]:
        """Return the command line of experiments.mnist that trains a model in a folder."""
        return [
            *self.common_arguments(model.seed, folder),
            *("--kernel", model.kernel),
            *("--model.num_mh_steps", str(model.num_mh_steps)),
            *("--trainer.max_epochs", str(self.num_epochs)),
            *("--trainer.max_steps", "-1"),
        ]
