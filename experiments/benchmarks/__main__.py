"""Time the samplers beside peers and the matrix products alone, and the training on the whole."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from experiments.benchmarks.cases import Sizes
from experiments.benchmarks.chains import small_target
from experiments.benchmarks.decoders import SIZES, annealing, posterior, sampler_update
from experiments.benchmarks.gpu import gpu
from experiments.benchmarks.memory import memory
from experiments.benchmarks.results import machine, show
from experiments.benchmarks.scaling import scaling
from experiments.benchmarks.startup import startup
from experiments.benchmarks.timing import compare
from experiments.benchmarks.training_profile import training_profile
from experiments.command import CommandError, run_command

Name = Literal["w1", "w2", "w3", "w4", "startup", "profile", "memory", "scaling", "gpu"]

BENCHMARKS: dict[str, list[Callable[[], dict[str, Any]]]] = {
    "w1": [partial(compare, small_target)],
    "w2": [partial(compare, partial(posterior, sizes)) for sizes in SIZES],
    "w3": [partial(compare, partial(annealing, sizes)) for sizes in SIZES],
    "w4": [partial(compare, partial(sampler_update, Sizes()))],
    "startup": [startup],
    "profile": [training_profile],
    "memory": [memory],
    "scaling": [scaling],
    "gpu": [gpu],
}


def main(arguments: list[str] | None = None) -> None:
    """Time, as the arguments say; by default those of the command line."""
    parser = ArgumentParser(
        prog="python -m experiments.benchmarks", description=__doc__, exit_on_error=False
    )
    parser.add_argument(
        "benchmarks", nargs="*", type=Name, help=f"{', '.join(BENCHMARKS)}; by default all but gpu."
    )
    parser.add_argument("--output", type=str | None, default=None, help="Results, a .json file.")
    parsed = parser.parse_args(arguments)
    output = None if parsed.output is None else Path(parsed.output)
    if output is not None and output.exists():
        raise CommandError(f"{output} exists already; choose another --output")
    results = []
    for name in parsed.benchmarks or [name for name in BENCHMARKS if name != "gpu"]:
        for benchmark in BENCHMARKS[name]:
            results.append({"benchmark": name, **benchmark()})
            show(results[-1])
    if output is not None:
        content = {"machine": machine(), "results": results}
        output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
