"""Train VAE, HMC-DGLM and L2HMC-DGLM over the number of MH steps and score them (Figure 2).

Kernels with equally many steps in z take equally many gradients an update (in coordinates the
siblings of L2HMC take some more), see the data in the same order, and train the same decoder.
Models that are finished are kept: --resume goes on.
"""

import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from experiments.likelihood_curve.cost import print_costs
from experiments.likelihood_curve.models import LikelihoodCurve
from experiments.likelihood_curve.results import differences, draw_curve, finished_rows, markdown
from experiments.shared.cli import command_options, resumed_arguments, run_command
from experiments.shared.runs import print_files, write_json
from experiments.shared.trainings import check_splits, run_in_folder, score_model, train_model

_GROWING = ("num_mh_steps", "seeds", "splits")
"""Options of which a run that is gone on with may have more."""


def main(arguments: list[str] | None = None) -> None:
    """Train and score, as the arguments say; by default those of the command line."""
    given = resumed_arguments(sys.argv[1:] if arguments is None else arguments)
    options = command_options("likelihood_curve", __doc__, LikelihoodCurve, given)
    if options.dry_run:
        print_costs(options)
        return
    if options.resume is None:
        check_splits(partial(options.training_arguments, options.models()[0]), options.splits)
    run_in_folder("likelihood_curve", options, _GROWING, draw_into)


def draw_into(folder: Path, options: LikelihoodCurve) -> None:
    """Train and score what is not there yet, and write the results anew after each model."""
    console = Console()
    for number, model in enumerate(options.models(), 1):
        console.print(f"{number} of {len(options.models())}: {model.name}", highlight=False)
        own = folder / model.name
        train_model(options, options.training_arguments(model, own), own)
        for split in options.splits:
            score_model(options, own, split)
        write_results(options, folder)
    console.print((folder / "table.md").read_text(), highlight=False, soft_wrap=True)
    print_files(folder)


def write_results(options: LikelihoodCurve, folder: Path) -> None:
    """Write results.json, table.md and curve.png of the models that are finished."""
    rows = finished_rows(options, folder)
    paired = differences(options, folder)
    write_json({"rows": rows, "differences": paired}, folder / "results.json")
    (folder / "table.md").write_text(markdown(rows, paired))
    draw_curve(options, rows, paired, folder / "curve.png")


if __name__ == "__main__":
    run_command(main)
