"""Train a VAE, HMC-DGLM or L2HMC-DGLM on images of digits, score it and draw it.

Without arguments: a demonstration sized for two CPU cores.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from data import ImageDataModule
from dglm import ReversibilityMonitor
from dglm.starts import named_start
from experiments.report import Evaluation, Trained, report
from experiments.shared.callbacks import (
    Banner,
    Clock,
    CompileTraining,
    ImagesOverTime,
    TrainingProgress,
    images_per_update,
    logged_metrics,
)
from experiments.shared.checkpoints import (
    LastTwo,
    SaveCheckpoints,
    check_same_model,
    last_checkpoint,
    read_checkpoint,
)
from experiments.shared.cli import (
    CONFIGS,
    CommandError,
    ConfigFile,
    Stopped,
    option_value,
    refused_options,
    resumed_arguments,
    run_command,
    with_switches,
)
from experiments.shared.models import KernelName, build_dglm
from experiments.shared.runs import create_run, held, keep_config, keep_metrics

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "max_steps": 2000,
    "log_every_n_steps": 10,
    "val_check_interval": 250,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    # The data module gives each process its own share.
    "use_distributed_sampler": False,
}


KEPT_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "default_root_dir": ((None,), "all files of a run are in one folder; choose --output"),
    "enable_checkpointing": ((None, True), "a run that keeps no checkpoint could not go on"),
    "use_distributed_sampler": ((False,), "the data module gives each process its own share"),
    "limit_test_batches": ((None,), "choose --evaluation.num_images"),
    "overfit_batches": ((0, 0.0), "choose few images of your own with --data.name"),
}
"""Values of the Trainer's options that can be, and why there are no others."""
LENGTHS = ("max_epochs", "max_steps", "limit_train_batches")
"""Options of the Trainer of which 0 would train nothing."""


class MnistCLI(LightningCLI):
    """LightningCLI with short names for what is used most."""

    folder: Path
    saving: SaveCheckpoints

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose --config also takes the name of a shipped configuration."""
        parser = LightningArgumentParser(**kwargs)
        shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        help_text = f"Configuration file, or the name of a shipped one: {shipped}."
        parser.add_argument("-c", "--config", action=ConfigFile, help=help_text)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the command itself, and pass them on to its parts."""
        parser.add_argument(
            "--kernel",
            type=KernelName,
            default="l2hmc",
            help="What refines posterior draws: none (VAE), hmc (HMC-DGLM) or l2hmc (L2HMC-DGLM).",
        )
        parser.add_argument("--seed", type=int, default=0, help="Seed of all that is random.")
        parser.add_argument(
            "--output", type=str | None, default=None, help="Run folder; runs/mnist-NNN if null."
        )
        parser.add_argument(
            "--resume", type=str | None, default=None, help="Run folder to go on with."
        )
        parser.add_argument("--quiet", type=bool, default=False, help="Show results alone.")
        parser.add_argument(
            "--compile",
            type=bool,
            default=False,
            help="Compile the chain of an update: a third faster, after some twenty seconds.",
        )
        parser.add_class_arguments(Evaluation, "evaluation")
        parser.link_arguments("kernel", "model.kernel")
        parser.link_arguments("data.image_shape", "model.image_shape", apply_on="instantiate")
        for target in ("seed_everything", "data.seed", "model.seed", "evaluation.seed"):
            parser.link_arguments("seed", target)
        # The Trainer's options, with which Lightning begins, are two thirds of --help.
        last = (parser.groups or {}).get("trainer")
        parser._action_groups = sorted(parser._action_groups, key=lambda group: group is last)

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:  # type: ignore[override]
        """Parse the command line, that of a resumed run after its saved configuration."""
        given = with_switches(sys.argv[1:] if args is None else args)
        if option_value(given, "--resume") and longer_by_epochs(given):
            given = [*given, "--trainer.max_steps=-1"]
        given = resumed_arguments(given)
        self.config = parser.parse_args(given)
        if self.config.trainer.max_epochs not in (None, TRAINER_DEFAULTS["max_epochs"]):
            # Else the demonstration's number of updates would cut the epochs short.
            parser.set_defaults({"trainer.max_steps": -1})
            self.config = parser.parse_args(given)
        if self.config.seed < 0:
            raise CommandError(f"--seed must be 0 or more, got {self.config.seed}")
        if self.config.model.likelihood == "gaussian" and self.config.data.binarize:
            raise CommandError("gaussian pixels are grey levels: add --data.binarize false")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a Trainer that logs and keeps its checkpoints in the run folder, made here."""
        chosen = self.config_init.trainer
        validation = self.config.data.validation != 0 and chosen.limit_val_batches != 0
        check_trainer_options(chosen, logged_metrics(self.model, validation))
        named_start(self.config_init.evaluation.start, self.model)  # may refuse it
        if self.config.resume is None:
            self.folder = create_run(self.config.output, "mnist")
            self.save_config()
        else:
            self.folder = Path(self.config.resume)
        self.saving = SaveCheckpoints(self.folder)
        self.clock = Clock()
        callbacks: list[Callback] = [
            self.clock,  # before what saves it
            *(ReversibilityMonitor(), ImagesOverTime(), self.saving),
        ]
        if self.config.compile:  # before what runs the kernel after an update
            callbacks.insert(0, CompileTraining())
        if not self.config.quiet:
            scoring = self.config_init.evaluation
            callbacks.append(Banner(self.config.compile, scoring, scoring.num_images, self.folder))
            if not chosen.enable_progress_bar:
                callbacks.append(TrainingProgress())
        if chosen.logger in (None, True):
            kwargs["logger"] = [
                CSVLogger(self.folder, name="", version=""),
                TensorBoardLogger(self.folder, name="", version=""),
            ]
        if self.config.data.validation == 0:
            kwargs["limit_val_batches"] = 0
        try:
            return super().instantiate_trainer(
                callbacks=[*listed(chosen.callbacks), *callbacks],
                plugins=[*listed(chosen.plugins), LastTwo()],
                **kwargs,
            )
        except Exception:
            self.remove_unused_folder()
            raise

    @rank_zero_only
    def remove_unused_folder(self) -> None:
        """Leave no folder behind where training could not even start."""
        if self.config.resume is None:
            shutil.rmtree(self.folder)

    def save_config(self) -> None:
        """Write what the run does into its folder; what a resumed one did before is kept aside."""
        saved = self.config.clone()
        saved.output, saved.resume = str(self.folder), None
        try:
            text = self.parser.dump(saved, skip_validation=True)
        except yaml.YAMLError as error:
            self.remove_unused_folder()
            raise CommandError(f"config.yaml cannot hold an option: {error}") from error
        keep_config(self.folder, text)


def check_trainer_options(chosen: Namespace, metrics: list[str]) -> None:
    """Refuse options of the Trainer that the command would ignore.

    Raises:
        CommandError: There is one; or nothing would be trained; or a callback waits for a metric
            that nobody logs, or takes the worst one for the best.
    """
    for name, (kept, reason) in KEPT_OPTIONS.items():
        if getattr(chosen, name) not in kept:
            raise CommandError(f"--trainer.{name} is not taken: {reason}")
    for name in LENGTHS:
        if getattr(chosen, name) == 0:
            raise CommandError(f"--trainer.{name} 0 trains nothing: leave it out, or choose more")
    callbacks = listed(chosen.callbacks)
    if any(isinstance(each, StochasticWeightAveraging) for each in callbacks):
        raise CommandError(
            "StochasticWeightAveraging averages after the last checkpoint, which would not hold "
            "it: take EMAWeightAveraging"
        )
    if any(not type(each).__module__.startswith("lightning.") for each in callbacks):
        return  # one of the user's own may log what another waits for
    for callback in callbacks:
        name, monitored = type(callback).__name__, getattr(callback, "monitor", None)
        if monitored is not None and monitored not in metrics:
            raise CommandError(
                f"{name} waits for {monitored}, which is not logged: choose one of "
                f"{', '.join(metrics)}"
            )
        if "/log_" in (monitored or "") and getattr(callback, "mode", None) == "min":
            raise CommandError(
                f"{name} takes the lowest {monitored} for the best, of which more is better: add "
                "--trainer.callbacks.mode max"
            )


def listed(chosen: Any) -> list[Any]:
    """Return what the Trainer takes alone, in a list or not at all as a list."""
    if chosen is None:
        return []
    return list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]


def longer_by_epochs(given: list[str]) -> bool:
    """Whether the arguments say how many epochs, and not how many updates."""
    epochs, steps = (
        option_value(given, f"--trainer.{name}") for name in ("max_epochs", "max_steps")
    )
    return epochs is not None and steps is None


def command_line(arguments: list[str] | None = None) -> MnistCLI:
    """Return the model, the data and the Trainer that the arguments ask for."""
    with refused_options():
        return MnistCLI(
            build_dglm,
            ImageDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={
                "prog": "python -m experiments.mnist",
                "usage": "%(prog)s [--kernel none|hmc|l2hmc] [options]",
                "description": __doc__,
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            args=arguments,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )


def main(arguments: list[str] | None = None) -> None:
    """Train, score and draw, as the arguments say; by default those of the command line."""
    cli = command_line(arguments)
    with alone(cli):
        try:
            trained = train(cli)
            options = cli.config_init.evaluation
            report(trained, cli.datamodule, options, cli.folder, cli.config.quiet)
        except Stopped as stopped:
            if last_checkpoint(cli.folder).exists():
                stopped.hint = f"go on with python -m experiments.mnist --resume {cli.folder}"
            raise


@contextmanager
def alone(cli: MnistCLI) -> Iterator[None]:
    """Hold the run folder, once it is one that can be gone on with."""
    checkpoint = last_checkpoint(cli.folder)
    if cli.config.resume is not None and not checkpoint.exists():
        raise CommandError(f"there is no {checkpoint} to resume from; start the run again")
    with held(cli.folder):
        yield


def train(cli: MnistCLI) -> Trained:
    """Fit the model, or go on with it, where no other process does."""
    with alone(cli):
        return fit(cli)


def fit(cli: MnistCLI) -> Trained:
    """Fit the model, or go on with it."""
    checkpoint = resumed_checkpoint(cli) if cli.config.resume is not None else None
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except (Exception, Stopped) as error:
        if cli.trainer.global_step == 0:
            cli.remove_unused_folder()
        if isinstance(error, ValueError | ImportError) and not cli.saving.began:
            # Lightning asks the model, and callbacks, whether it can be trained like this only now.
            raise CommandError(str(error)) from error
        raise
    images = images_per_update(cli.trainer, cli.datamodule)
    if not isinstance(cli.trainer.strategy.launcher, _MultiProcessingLauncher):
        return Trained(cli.model, cli.trainer, cli.trainer.global_step, images)
    # What spawned processes have trained is in their checkpoint; the rest is done in this one.
    content = read_checkpoint(last_checkpoint(cli.folder))
    cli.model.load_state_dict(content["state_dict"])
    cli.model.safeguard.load_state_dict(content["callbacks"]["Safeguard"])
    cli.datamodule.setup()
    accelerator = cli.config.trainer.accelerator
    trainer = Trainer(accelerator=accelerator, devices=1, logger=False, enable_progress_bar=False)
    return Trained(cli.model, trainer, content["global_step"], images)


def resumed_checkpoint(cli: MnistCLI) -> Path:
    """Return the checkpoint to go on from, if it is one of this model on these data."""
    checkpoint = last_checkpoint(cli.folder)
    content = read_checkpoint(checkpoint)
    check_same_model(cli.folder, content["hyper_parameters"], dict(cli.model.hparams))
    cli.datamodule.setup()
    cli.datamodule.check_resumable(content["ImageDataModule"])
    keep_metrics(cli.folder)
    cli.save_config()
    return checkpoint


if __name__ == "__main__":
    run_command(main)
