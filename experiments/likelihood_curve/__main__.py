"""Train VAE, HMC-DGLM and L2HMC-DGLM over the number of MH steps and score them (Figure 2).

Kernels with equally many steps take equally many gradients an update, and start from the same
weights, with the same order of the data. Models that are finished are kept: --resume goes on.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from experiments.likelihood_curve.cost import print_costs
from experiments.likelihood_curve.models import (
    LikelihoodCurve,
    check_splits,
    score_model,
    train_model,
)
from experiments.likelihood_curve.results import differences, draw_curve, finished_rows, markdown
from experiments.shared.cli import (
    Stopped,
    command_options,
    resumed_arguments,
    run_command,
)
from experiments.shared.runs import (
    check_same_options,
    create_run,
    held,
    keep_config,
    print_files,
    write_json,
)

_GROWING = ("num_mh_steps", "seeds", "splits")
"""Options of which a run that is gone on with may have more."""


def main(arguments: list[str] | None = None) -> None:
    """Train and score, as the arguments say; by default those of the command line."""
    given = resumed_arguments(sys.argv[1:] if arguments is None else arguments)
    options = command_options("likelihood_curve", __doc__, LikelihoodCurve, given)
    if options.dry_run:
        print_costs(options)
    else:
        draw(options)


def draw(options: LikelihoodCurve) -> None:
    """Train, score and write the results, anew after each model.

    Raises:
        Stopped: By a signal; what is done is kept.
    """
    if options.resume is None:
        check_splits(options)
        folder = create_run(options.output, "likelihood_curve")
    else:
        folder = Path(options.resume)
        options = gone_on_with(folder, options)
    try:
        with held(folder):
            draw_into(folder, options)
    except Stopped as stopped:
        stopped.hint = f"go on with python -m experiments.likelihood_curve --resume {folder}"
        raise


def draw_into(folder: Path, options: LikelihoodCurve) -> None:
    """Train and score what is not there yet, and write the results."""
    saved = {**asdict(options), "output": None, "resume": None}
    keep_config(folder, yaml.safe_dump(saved, sort_keys=False))
    console = Console()
    for number, model in enumerate(options.models(), 1):
        console.print(f"{number} of {len(options.models())}: {model.name}", highlight=False)
        train_model(options, model, folder / model.name)
        for split in options.splits:
            score_model(options, folder / model.name, split)
        write_results(options, folder)
    console.print((folder / "table.md").read_text(), highlight=False, soft_wrap=True)
    print_files(folder)


def gone_on_with(folder: Path, options: LikelihoodCurve) -> LikelihoodCurve:
    """Return the options with those models and splits, too, that the run has already.

    Raises:
        CommandError: Models or scores would be other ones than those that are there.
    """
    begun = yaml.safe_load((folder / "config.yaml").read_text())
    free = (*_GROWING, "data", "dry_run", "output", "resume", "quiet")
    check_same_options(folder, begun, asdict(options), free)
    name = begun["data"]["name"]
    check_same_options(folder, {"data.name": name}, {"data.name": options.data.name}, ())
    grown: dict[str, Any] = {
        each: list(dict.fromkeys([*begun[each], *getattr(options, each)])) for each in _GROWING
    }
    return replace(options, **grown)


def write_results(options: LikelihoodCurve, folder: Path) -> None:
    """Write results.json, table.md and curve.png of the models that are finished."""
    rows = finished_rows(options, folder)
    paired = differences(options, folder)
    write_json({"rows": rows, "differences": paired}, folder / "results.json")
    (folder / "table.md").write_text(markdown(rows, paired))
    draw_curve(options, rows, paired, folder / "curve.png")


if __name__ == "__main__":
    run_command(main)
