"""Compare samplers on targets: learned by default, the paper's way, tuned HMC, NUTS and others."""

import re
import sys
import time
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from experiments.shared.cli import (
    CommandError,
    Stopped,
    command_parser,
    option_value,
    refused_options,
    resumed_arguments,
    run_command,
    with_switches,
)
from experiments.shared.runs import (
    check_same_options,
    create_run,
    held,
    print_files,
    write_json,
)
from experiments.targets.contenders import Contender, Setting, contenders
from experiments.targets.figure import draw_autocorrelations
from experiments.targets.nuts import nuts_is_installed, run_nuts
from experiments.targets.reference import Reference, weight_from_one_mode
from experiments.targets.table import markdown
from samplers import Chains, sample, seeded_generator
from samplers.chains import draw_chains
from samplers.comparison import Comparison, warn_of_misleading
from samplers.io import load_plain, save_whole, write_whole
from samplers.learning import BUDGET

TargetName = Literal[
    "icg",
    "scg",
    "mog",
    "mog_unequal",
    "rough_well",
    "funnel",
    "banana",
    "logistic_regression",
    "eight_schools",
    "eight_schools_centred",
    "stochastic_volatility",
    "gaussian_process",
]
SamplerName = Literal[
    "learned",
    "L2HMC, trained",
    "the paper's way",
    "jumps, the paper's setting",
    "HMC, tuned",
    "HMC, dense mass, tuned",
    "independence",
    "NUTS, blackjax",
]
PAPER = ("icg", "scg", "mog", "rough_well")
"""The targets of the paper's table."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared on which target.

    Args:
        target: The target; all for each of the paper's table in turn.
        seed: Seed of all randomness.
        num_chains: Chains of the comparison: from exact draws, of posteriors from a warm-up's end.
        num_steps: Steps of each chain.
        budget: Gradients that learning takes.
        num_iterations: Updates of the training of the paper's way, and twice those of jumps.
        samplers: Which of the table's; all if empty.
        compile: Compile each sampler before its chains are timed.
        output: Run folder, with a folder in it for each target where there are several;
            runs/targets/TARGET-NNN if null.
        resume: Run folder to go on with.
        quiet: Show no progress bars.
    """

    target: TargetName | Literal["all"] = "scg"
    seed: int = 0
    num_chains: int = 200
    num_steps: int = 2000
    budget: int = BUDGET
    num_iterations: int = 5000
    samplers: list[SamplerName] = field(default_factory=list)
    compile: bool = True
    output: str | None = None
    resume: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError where a number is out of range."""
        for name, least in (("num_chains", 20), ("num_steps", 50), ("num_iterations", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.budget < BUDGET // 10:
            raise ValueError(f"budget must be at least {BUDGET // 10}, got {self.budget}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def main(arguments: list[str] | None = None) -> None:
    """Compare, as the arguments say; by default those of the command line."""
    given = with_switches(sys.argv[1:] if arguments is None else arguments)
    # Tensors this small gain nothing from a second thread, and wait for it where cores are busy.
    torch.set_num_threads(1)
    options, saved = parse(given)
    if options.target != "all":
        run(options, saved)
        return
    if options.resume is not None:
        raise CommandError("--resume goes on with one target: name it, or leave --target out")
    for index, name in enumerate(PAPER):
        output = option_value(given, "--output")
        folder = [] if output is None else ["--output", f"{output}/{name}"]
        try:
            run(*parse([*given, *folder, "--target", name]))
        except Stopped as stopped:
            stopped.hint += "".join(f"; then --target {other}" for other in PAPER[index + 1 :])
            raise


def parse(arguments: list[str]) -> tuple[Options, str]:
    """Return the options, and as the YAML that a run keeps."""
    parser = command_parser("targets", __doc__)
    parser.add_class_arguments(Options)
    with refused_options():
        config = parser.parse_args(resumed_arguments(arguments))
        parsed = parser.instantiate(config).as_dict()
        del parsed["config"]
        return Options(**parsed), parser.dump(config)


def run(options: Options, saved: str) -> None:
    """Train, measure every sampler, write the table and the picture.

    Raises:
        Stopped: By a signal; what is finished is kept.
    """
    if options.resume is None:
        folder = create_run(options.output, f"targets/{options.target}")
        (folder / "checkpoints").mkdir()
        write_whole(saved, folder / "config.yaml")
    else:
        folder = Path(options.resume)
        begun, _ = parse(["--resume", options.resume])
        check_same_options(folder, asdict(begun), asdict(options), ("quiet", "samplers"))
    try:
        with held(folder):
            rows = compared(options, folder)
    except Stopped as stopped:
        stopped.hint = f"go on with python -m experiments.targets --resume {folder}"
        raise
    write_json(rows, folder / "results.json")
    write_whole(markdown(rows), folder / "table.md")
    Console().print(markdown(rows), highlight=False, soft_wrap=True)
    print_files(folder)


def compared(options: Options, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each sampler; finished ones are read back."""
    reference = Reference.of(options.target)
    setting = Setting(
        options.target,
        reference.target,
        options.seed,
        options.num_steps,
        options.num_iterations,
        options.budget,
        folder / "checkpoints",
        options.quiet,
    )
    table, rows, correlations = Comparison(), [], {}

    def measured(name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Take the row of a sampler from its file, or do the work and keep it there."""
        if options.samplers and name not in options.samplers:
            return
        path = folder / "checkpoints" / f"row-{re.sub('[^a-z0-9]+', '-', name.lower())}.pt"
        if not path.exists():
            save_whole(work(), path)
        content = load_plain(path)
        correlations[name] = content["correlations"]
        rows.append({"target": options.target, "seed": options.seed, **content["row"]})
        for key, value in content["compared"].items():
            table.setdefault(key, []).append(value)

    start = setting.start(options.num_chains)
    for name, build in contenders(setting).items():
        measured(name, lambda name=name, build=build: own(name, build(), start, options, reference))  # type: ignore[misc]
    if nuts_is_installed():

        def nuts() -> dict[str, Any]:
            chains, cost, settings = run_nuts(
                reference.target, start, options.num_steps, options.seed
            )
            paid = Contender(None, settings, cost.training_gradients, cost.training_seconds)
            row = "NUTS, blackjax", paid, chains, cost.gradients_per_step, cost.seconds
            return measured_row(*row, reference)

        measured("NUTS, blackjax", nuts)
    warn_of_misleading(table)
    draw_autocorrelations(folder / "autocorrelation.png", options.target, correlations, rows)
    return rows


def own(
    name: str, contender: Contender, start: Tensor, options: Options, reference: Reference
) -> dict[str, Any]:
    """Run a kernel of our own and measure it."""
    assert contender.kernel is not None
    moving = copy(contender.kernel)
    if options.compile:
        moving.compile()
        sample(moving, reference.target, start, 2)  # compiles, which is not counted for NUTS either
    generator = seeded_generator("cpu", options.seed, "targets.draws")
    began = time.perf_counter()
    chains = draw_chains(moving, reference.target, start, options.num_steps, generator=generator)
    seconds = time.perf_counter() - began
    cost = contender.kernel.num_leapfrogs, seconds
    content = measured_row(name, contender, chains, *cost, reference)
    off = weight_from_one_mode(moving, reference.target, options.seed)
    content["row"]["weight_from_one_mode"] = off
    return content


def measured_row(
    name: str,
    contender: Contender,
    chains: Chains,
    gradients_per_step: float,
    seconds: float,
    reference: Reference,
) -> dict[str, Any]:
    """Return the row of a sampler: compared, in the results, and for the picture."""
    table = Comparison()
    found = table.add(name, chains, gradients_per_step, seconds)
    paper, correlations = reference.paper(chains.draws)
    row = {
        "sampler": name,
        "settings": contender.settings,
        "ess": paper.value,
        "ess_standard_error": paper.standard_error,
        "ess_per_gradient": paper.value / gradients_per_step,
        "min_coordinate_ess": found.worst,
        "min_coordinate_ess_per_gradient": found.worst / gradients_per_step,
        "min_coordinate_ess_of_squares": found.ess_squares,
        "r_hat": found.r_hat,
        "error_of_moments": reference.error(chains.draws),
        "weight_from_one_mode": float("nan"),
        "acceptance": float(chains.acceptance.mean()),
        "diverging": float(chains.diverging.float().mean()),
        "stuck": table["stuck"][0],
        "gradients_per_step": gradients_per_step,
        "num_chains": chains.draws.shape[0],
        "num_steps": chains.draws.shape[1],
        "seconds": seconds,
        "training_gradients": contender.gradients,
        "training_seconds": contender.seconds,
        "message": contender.message,
    }
    compared = {key: column[0] for key, column in table.items()}
    return {"row": row, "compared": compared, "correlations": correlations}


if __name__ == "__main__":
    run_command(main)
