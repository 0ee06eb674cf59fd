"""Train L2HMC on a target whose answers are known and compare it with Hamiltonian Monte Carlo.

Each target has a shipped configuration, configs/targets/TARGET.yaml; options on the command line
come after it.
"""

import sys
import time
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from experiments.shared.cli import (
    CommandError,
    ConfigFile,
    Stopped,
    counted,
    option_value,
    resumed_arguments,
    run_command,
    stopped_between,
    with_switches,
)
from experiments.shared.runs import check_same_options, create_run, write_json
from experiments.targets.figures import draw_figures
from experiments.targets.measure import Cost, Measured, Reference, mode_weights
from experiments.targets.nuts import nuts_is_installed, run_nuts
from experiments.targets.options import PAPER, Compare, SamplerOptions, WhitenedOptions
from experiments.targets.table import markdown
from experiments.targets.tuning import baselines, settings_of, warm_up_gradients, warmed_up
from samplers import (
    L2HMC,
    TARGETS,
    Chains,
    GaussianMixture,
    Kernel,
    Preconditioned,
    Target,
    TrainingSettings,
    parallel_tempering,
    sample,
    seeded_generator,
    train_sampler,
)
from samplers.io import write_whole

_START_STREAM, _DRAWS_STREAM, _TEMPERING_STREAM = 10, 11, 12
_MODE_CHAINS = 5
"""Chains that start in one mode, for each of the comparison: a mode's weight is hard to tell."""
_WORTH_COMPILING = 40_000
"""Leapfrogs of a training from which on compiling gains more than it takes.

It takes 16 to 22 seconds, and saves 0.4 to 0.75 milliseconds a leapfrog of 200 to 400 chains.
"""


def main(arguments: list[str] | None = None) -> None:
    """Compare, as the arguments say; by default those of the command line."""
    given = with_switches(sys.argv[1:] if arguments is None else arguments)
    # Tensors this small gain nothing from a second thread, and wait for it where cores are busy.
    torch.set_num_threads(1)
    chosen, output = chosen_target(given), option_value(given, "--output")
    if chosen != "all":
        compare(*parse(given, chosen))
        return
    for index, name in enumerate(PAPER):
        folder = [] if output is None else ["--output", f"{output}/{name}"]
        try:
            compare(*parse([*given, *folder], name))
        except Stopped as stopped:
            stopped.hint += "".join(f"; then --target {other}" for other in PAPER[index + 1 :])
            raise


def chosen_target(arguments: list[str]) -> str:
    """Return the target that the arguments name, the default one where they do not.

    Raises:
        CommandError: It is another than that of the run that is to be resumed.
    """
    parser = options_parser()
    chosen = parser.parse_args(resumed_arguments(arguments)).target
    run = option_value(arguments, "--resume")
    if run is not None:
        own = parser.parse_args(resumed_arguments(["--resume", run])).target
        if chosen != own:
            raise CommandError(f"--resume {run}: it is a run of {own}; leave out --target {chosen}")
    return chosen


def parse(arguments: list[str], target: str) -> tuple[Compare, str]:
    """Return the options for a target, and as the YAML that a run keeps.

    A run that is resumed has the shipped configuration in its own.
    """
    if option_value(arguments, "--resume") is None:
        arguments = ["--config", f"targets/{target}", *arguments, "--target", target]
    parser = options_parser()
    config = parser.parse_args(resumed_arguments(arguments))
    parsed = parser.instantiate(config).as_dict()
    del parsed["config"]
    return Compare(**parsed), parser.dump(config)


def options_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = ArgumentParser(
        prog="python -m experiments.targets",
        description=__doc__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action=ConfigFile, help="Configuration file.")
    parser.add_class_arguments(Compare)
    parser.link_arguments("seed", "training.seed")
    return parser


def compare(options: Compare, saved: str) -> None:
    """Train, measure every sampler, write the table and the pictures.

    Raises:
        Stopped: By a signal; training goes on from its last checkpoint.
    """
    if options.resume is None:
        folder = create_run(options.output, f"targets/{options.target}")
        (folder / "checkpoints").mkdir()
        write_whole(saved, folder / "config.yaml")
    else:
        folder = Path(options.resume)
        begun, _ = parse(["--resume", options.resume], options.target)
        check_same_options(folder, asdict(begun), asdict(options), ("quiet",))
    target = TARGETS[options.target]().float()
    try:
        kernel, lines = measure_all(target, options, folder)
    except Stopped as stopped:
        stopped.hint = f"go on with python -m experiments.targets --resume {folder}"
        raise
    rows = [{**line.row, "target": options.target, "seed": options.seed} for line in lines]
    write_json(rows, folder / "results.json")
    (folder / "table.md").write_text(markdown(rows))
    draw_figures(folder, target, kernel, lines)
    console = Console()
    console.print(markdown(rows), highlight=False, soft_wrap=True)
    for path in sorted(folder.iterdir()):
        console.print(f"  {path}", highlight=False, soft_wrap=True)


def measure_all(target: Target, options: Compare, folder: Path) -> tuple[Kernel, list[Measured]]:
    """Return the learned kernel, and the lines of all samplers."""
    start = target.sample(options.num_chains, seeded_generator("cpu", options.seed, _START_STREAM))
    measure = partial(_measured, target, start, options)
    kernel, cost = train(target, start, options, folder, options.sampler)
    lines = [measure("L2HMC", settings_of(kernel), kernel, *cost)]
    if options.whitened is not None:
        other, cost = train(target, start, options, folder, options.whitened)
        lines.append(measure("L2HMC, whitened", settings_of(other), other, *cost))
    leapfrogs = options.sampler.num_leapfrogs
    for name, tuned in baselines(target, start, leapfrogs, options.num_steps, options.seed).items():
        lines.append(measure(name, tuned.settings, tuned.kernel, tuned.gradients, tuned.seconds))
    return kernel, lines + others(target, start, options)


def train(
    target: Target, start: torch.Tensor, options: Compare, folder: Path, sampler: SamplerOptions
) -> tuple[Kernel, tuple[int, float]]:
    """Return a trained kernel, and its training's gradients over all chains and seconds."""
    name, training = "training", options.training
    torch.manual_seed(options.seed)
    kernel: Kernel = L2HMC(
        target.dim,
        sampler.num_leapfrogs,
        sampler.step_size,
        hidden=sampler.hidden,
        head_scale=sampler.head_scale,
    )
    gradients, seconds = 0, 0.0
    if isinstance(sampler, WhitenedOptions):
        name = "training-whitened"
        training = replace(
            TrainingSettings(),
            num_iterations=min(3000, training.num_iterations),
            seed=training.seed,
            initial_temperature=training.initial_temperature,
        )
        training = replace(training, annealing_iterations=training.num_iterations * 3 // 4)
        began = time.perf_counter()
        warm = cast(
            Preconditioned, warmed_up(target, start, "dense", options.num_steps, options.seed)
        )
        kernel = warm.with_kernel(kernel)
        gradients = warm_up_gradients(options.num_steps) * len(start)
        seconds = time.perf_counter() - began

    def initial(count: int, generator: torch.Generator) -> torch.Tensor:
        return sampler.initial_scale * torch.randn(count, target.dim, generator=generator)

    trained = copy(kernel)
    if options.compile and training.num_iterations * sampler.num_leapfrogs >= _WORTH_COMPILING:
        trained.compile()
    with (
        counted(f"{options.target}, {name}", training.num_iterations, options.quiet) as shown,
        stopped_between(shown) as progress,
    ):
        history = train_sampler(
            trained,
            target,
            initial,
            training,
            checkpoint=folder / "checkpoints" / f"{name}.pt",
            progress=progress,
        )
    chains = training.num_chains * (2 if training.initial_weight > 0 else 1)
    gradients += training.num_iterations * (sampler.num_leapfrogs + 1) * chains
    if history.diverging.mean() > 0.01:
        share = float(history.diverging.mean())
        print(f"{share:.1%} of the training's steps diverged: try a smaller --sampler.step_size")
    return kernel, (gradients, seconds + float(history.seconds.sum()))


def others(target: Target, start: torch.Tensor, options: Compare) -> list[Measured]:
    """Return parallel tempering and blackjax's NUTS, where asked for and installed."""
    lines, reference = [], Reference(target)
    if options.temperatures:
        began = time.perf_counter()
        leapfrogs = options.sampler.num_leapfrogs
        chains = parallel_tempering(
            target,
            start,
            options.num_steps,
            torch.tensor(options.temperatures),
            num_leapfrogs=leapfrogs,
            generator=seeded_generator("cpu", options.seed, _TEMPERING_STREAM),
        )
        count = len(options.temperatures)
        cost = Cost(count * leapfrogs, time.perf_counter() - began)
        settings = f"{count} temperatures to {options.temperatures[-1]:g}"
        lines.append(reference.measure("Parallel tempering", settings, chains, cost))
    if nuts_is_installed():
        chains, cost, settings = run_nuts(target, start, options.num_steps, options.seed)
        lines.append(reference.measure("NUTS, blackjax", settings, chains, cost))
    return lines


def _measured(
    target: Target,
    start: torch.Tensor,
    options: Compare,
    name: str,
    settings: str,
    kernel: Kernel,
    training_gradients: int,
    training_seconds: float,
) -> Measured:
    """Run a kernel from exact draws and measure it."""
    moving = copy(kernel)
    if options.compile:
        moving.compile()
        sample(moving, target, start, 2)  # compiles, which is not counted: not for NUTS either
    generator = seeded_generator("cpu", options.seed, _DRAWS_STREAM)
    began = time.perf_counter()
    chains: Chains = sample(moving, target, start, options.num_steps, generator=generator)
    seconds = time.perf_counter() - began
    cost = Cost(kernel.num_leapfrogs, seconds, training_gradients, training_seconds)
    measured = Reference(target).measure(name, settings, chains, cost)
    if isinstance(target, GaussianMixture):
        count, steps = _MODE_CHAINS * options.num_chains, options.num_steps // 10
        measured.row.update(mode_weights(kernel, target, count, steps, generator))
    return measured


if __name__ == "__main__":
    run_command(main)
