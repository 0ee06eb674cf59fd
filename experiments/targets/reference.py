"""What is known of the targets: exact moments, or those of long runs.

``python -m experiments.targets.reference`` makes the long runs and writes their moments anew.
"""

import math
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from experiments.shared.cli import CommandError, run_command
from experiments.shared.runs import read_json, write_json
from samplers import (
    HMC,
    TARGETS,
    Funnel,
    GaussianMixture,
    Kernel,
    Preconditioned,
    adapt,
    sample,
    sample_chunks,
    seeded_generator,
    summarise,
)
from samplers.adaptation import settle
from samplers.comparison import tune_hmc
from samplers.diagnostics import ESSPerStep, autocorrelation, ess_per_step
from samplers.posteriors import POSTERIORS

MOMENTS = Path(__file__).with_name("moments.json")
_DRAWS = 200_000
_MODE_CHAINS = 2_000


class Reference:
    """A target, and its moments of x and x² with their standard errors.

    Arguments:
        target: What is sampled, in float32.
        moments: Of (x, x²): mean and standard error, (2D,) each, and covariances of either, (D, D).
    """

    def __init__(
        self,
        target: nn.Module,
        mean: Tensor,
        standard_error: Tensor,
        covariance: Tensor,
        square_covariance: Tensor,
    ) -> None:
        self.target = target
        self.mean, self.standard_error = mean, standard_error
        self.covariance, self.square_covariance = covariance, square_covariance

    @classmethod
    def of(cls, name: str) -> "Reference":
        """Return that of a target: from exact draws, or from the long runs kept here."""
        if name in TARGETS:
            target = TARGETS[name]()
            draws = target.sample(_DRAWS, seeded_generator("cpu", 0), torch.float64)
            both = torch.cat([draws, draws.square()], dim=1)
            mean, error = both.mean(dim=0), both.std(dim=0) / math.sqrt(_DRAWS)
            covariances = target.covariance, draws.square().T.cov()
            return cls(target.float(), mean, error, *covariances)
        found = read_json(MOMENTS).get(name) if MOMENTS.exists() else None
        if found is None:
            raise CommandError(
                f"there are no moments of {name}: python -m experiments.targets.reference"
            )
        moments = (torch.tensor(found[key], dtype=torch.float64) for key in _KEYS)
        return cls(POSTERIORS[name]().float(), *moments)

    def paper(self, draws: Tensor) -> tuple[ESSPerStep, dict[str, Tensor]]:
        """Return the paper's ESS of x a step, no cut, and autocorrelations of x and x²."""
        dim = draws.shape[-1]
        of_x = autocorrelation(draws, self.mean[:dim], self.covariance)
        of_squares = autocorrelation(draws.square(), self.mean[dim:], self.square_covariance)
        return ess_per_step(of_x), {"x": of_x.mean(dim=0), "x²": of_squares.mean(dim=0)}

    def error(self, draws: Tensor) -> float:
        """Return by how many standard errors the worst moment of x or x² is off.

        Of a funnel only those of its first coordinate, v: the others' tails are too heavy.
        """
        dim = draws.shape[-1]
        both = torch.cat([draws, draws.square()], dim=-1).double()
        found = summarise(both)
        error = (found.mcse.square() + self.standard_error.square()).sqrt()
        off = ((both.mean(dim=(0, 1)) - self.mean) / error).abs()
        return float(off[[0, dim]].max() if isinstance(self.target, Funnel) else off.max())


def weight_from_one_mode(kernel: Kernel, target: nn.Module, seed: int) -> float:
    """Return by how many standard errors the weight of a mixture's first mode is off.

    Of the last of 100 steps of chains that all start there; NaN of other targets.
    """
    if not isinstance(target, GaussianMixture):
        return math.nan
    start = target.centres[:1].float().expand(_MODE_CHAINS, -1)
    generator = seeded_generator("cpu", seed, "targets.one mode")
    ends = sample(kernel, target, start, 1, thin=100, generator=generator).draws[:, 0]
    share = target.responsibilities(ends)[:, 0].double()
    # Of independent draws with the right weight: chains that never left would have none.
    error = math.sqrt(float(target.weights[0] * (1 - target.weights[0])) / _MODE_CHAINS)
    return abs(float(share.mean() - target.weights[0])) / error


_KEYS = ("mean", "standard_error", "covariance", "square_covariance")


def long_run(name: str, num_chains: int, num_steps: int, seed: int) -> dict[str, Any]:
    """Return moments of a posterior from tuned HMC in float64, in the form of the file."""
    # A funnel, which no chain explores: through the other parametrization.
    centred = name == "eight_schools_centred"
    target = POSTERIORS["eight_schools" if centred else name]().double()
    dim, scale = int(target.dim), float(target.start_scale)  # type: ignore[arg-type]
    generator = seeded_generator("cpu", seed, "targets.reference", name)
    start = scale * torch.randn(num_chains, dim, generator=generator, dtype=torch.float64)
    position = settle(target, start, generator=generator)
    warm = adapt(HMC(8), target, position, 600, mass="dense", target=0.9, generator=generator)
    assert isinstance(warm.kernel, Preconditioned)
    kernel = tune_hmc(warm.kernel, target, warm.position, 400, generator)
    chunks = [
        chunk.draws
        for chunk, _ in sample_chunks(kernel, target, warm.position, num_steps, generator=generator)
    ]
    draws = torch.cat(chunks, dim=1)
    if centred:
        schools = draws[..., :1] + draws[..., 1:2].exp() * draws[..., 2:]
        draws = torch.cat([draws[..., :2], schools], dim=-1)
    both = torch.cat([draws, draws.square()], dim=-1)
    found, flat = summarise(both), both.flatten(0, 1)
    return {
        "mean": flat.mean(dim=0).tolist(),
        "standard_error": found.mcse.tolist(),
        "covariance": draws.flatten(0, 1).T.cov().tolist(),
        "square_covariance": flat[:, dim:].T.cov().tolist(),
        "ess_bulk": float(found.ess_bulk.min()),
        "r_hat": float(found.r_hat.max()),
        "num_chains": num_chains,
        "num_steps": num_steps,
        "seed": seed,
    }


def main(
    targets: list[str] | None = None, num_chains: int = 50, num_steps: int = 4000, seed: int = 0
) -> None:
    """Make long runs of posteriors and write their moments.

    Args:
        targets: Their names; all if null.
        num_chains: Chains of tuned HMC, in float64.
        num_steps: Steps of each, after a warm-up.
        seed: Of all randomness.
    """
    torch.set_num_threads(1)
    known = read_json(MOMENTS) if MOMENTS.exists() else {}
    for name in targets or list(POSTERIORS):
        if name not in POSTERIORS:
            raise CommandError(f"{name} is none of {', '.join(POSTERIORS)}")
        known[name] = long_run(name, num_chains, num_steps, seed)
        write_json(known, MOMENTS)
        worst = known[name]["ess_bulk"], known[name]["r_hat"]
        print(f"{name}: bulk ESS {worst[0]:.0f}, R̂ {worst[1]:.4f}")


if __name__ == "__main__":
    run_command(lambda: auto_cli(main))
