"""Time the samplers beside peers and the matrix products alone."""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from experiments.benchmarks.cases import Sizes
from experiments.benchmarks.gpu import gpu
from experiments.benchmarks.scaling import scaling
from experiments.benchmarks.timing import compare, machine, show
from experiments.benchmarks.workloads import (
    SIZES,
    annealing,
    posterior,
    sampler_update,
    small_target,
)
from experiments.shared.cli import run_command
from experiments.shared.runs import output_file, write_json

Name = Literal["w1", "w2", "w3", "w4", "scaling", "gpu"]

BENCHMARKS: dict[str, list[Callable[[], dict[str, Any]]]] = {
    "w1": [partial(compare, small_target)],
    "w2": [partial(compare, partial(posterior, sizes)) for sizes in SIZES],
    "w3": [partial(compare, partial(annealing, sizes)) for sizes in SIZES],
    "w4": [partial(compare, partial(sampler_update, Sizes()))],
    "scaling": [scaling],
    "gpu": [gpu],
}

_DESCRIPTION = f"""{__doc__}

  w1        HMC on a small Gaussian, many chains
  w2        HMC on the posterior p(z|x) of a decoder
  w3        annealed importance sampling
  w4        an update of the sampler of an L2HMC-DGLM, beside the one first published
  scaling   how the time of a sampler update grows with its sizes
  gpu       sampler updates and annealed importance sampling on a CUDA GPU"""


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description."""


def main(arguments: list[str] | None = None) -> None:
    """Time, as the arguments say; by default those of the command line."""
    parser = ArgumentParser(
        prog="python -m experiments.benchmarks",
        description=_DESCRIPTION,
        formatter_class=_Formatter,
        exit_on_error=False,
    )
    parser.add_argument(
        "benchmarks", nargs="*", type=Name, default=[], help="Which; by default all but gpu."
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="Results, a .json file, written after each benchmark.",
    )
    parsed = parser.parse_args(arguments)
    names = parsed.benchmarks or [name for name in BENCHMARKS if name != "gpu"]
    if parsed.output is None:
        run(names, None)
        return
    with output_file(parsed.output, "", "", ".json") as output:
        run(names, output)


def run(names: list[str], output: Path | None) -> None:
    """Run benchmarks in turn; show each one's results, and write all so far."""
    results = []
    for name in names:
        for benchmark in BENCHMARKS[name]:
            results.append({"benchmark": name, **benchmark()})
            show(results[-1])
            if output is not None:
                write_json({"machine": machine(), "results": results}, output)


if __name__ == "__main__":
    run_command(main)
