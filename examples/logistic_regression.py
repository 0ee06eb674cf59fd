"""Bayesian logistic regression: HMC, a trained L2HMC, and blackjax's NUTS as outside reference.

    python examples/logistic_regression.py

Which of 569 tumours are malignant, from 30 measurements that scikit-learn ships. With x the
measurements of one, standardised, a one beside them, and y = ±1,

    p(w | data) ∝ N(w; 0, I) ∏ sigmoid(y xᵀ w).

Many measurements say almost the same, so the posterior is narrow in some directions and wide in
others. A warm-up finds its covariance; L2HMC learns in the coordinates in which that is one.
"""

from typing import Any, NamedTuple

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.nn.functional import softplus

from experiments.targets.nuts import check_density, nuts_is_installed, sample_with_nuts
from samplers import (
    HMC,
    L2HMC,
    Kernel,
    Preconditioned,
    Summary,
    TrainingSettings,
    adapt,
    sample,
    seeded_generator,
    summarise,
    train_sampler,
)


class LogisticRegression:
    """The posterior of the weights, as an energy."""

    def __init__(self) -> None:
        measurements, benign = load_breast_cancer(return_X_y=True)
        x = torch.from_numpy(measurements).float()
        x = (x - x.mean(dim=0)) / x.std(dim=0)
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        self.signed = (1 - 2 * torch.from_numpy(benign)).float()[:, None] * x
        self.dim = x.shape[1]

    def __call__(self, weights: Tensor) -> Tensor:
        """Return U = Σ log(1 + exp(-y xᵀ w)) + ‖w‖² / 2 of weights (B, D), in nats, (B,)."""
        margins = weights @ self.signed.T
        return softplus(-margins).sum(dim=1) + 0.5 * weights.square().sum(dim=1)

    def log_density(self, weights: Any) -> Any:
        """Return -U of one point, for JAX."""
        from jax import nn, numpy

        margins = self.signed.numpy() @ weights
        return -numpy.sum(nn.softplus(-margins)) - 0.5 * weights @ weights


class Result(NamedTuple):
    """What a sampler has found of the posterior."""

    sampler: str
    mean: Tensor
    """Of each weight, (D,)."""
    deviation: Tensor
    """Of each weight, (D,)."""
    summary: Summary
    gradients: float
    """Of all chains, for the draws that count."""
    training_gradients: int


def result(
    sampler: str, draws: Tensor, gradients_per_step: float, training_gradients: int
) -> Result:
    """Look at draws (chain, draw, D)."""
    flat = draws.double().flatten(0, 1)
    gradients = len(flat) * gradients_per_step
    return Result(
        sampler, flat.mean(dim=0), flat.std(dim=0), summarise(draws), gradients, training_gradients
    )


def run(
    num_chains: int, num_warmup: int, num_iterations: int, num_steps: int, seed: int
) -> list[Result]:
    """Return the posterior by each sampler; the last one is the reference."""
    energy = LogisticRegression()
    start = torch.randn(num_chains, energy.dim, generator=seeded_generator("cpu", seed, 0))
    generator = seeded_generator("cpu", seed, "warm-up")
    warm = adapt(HMC(10, 0.01), energy, start, num_warmup, mass="dense", generator=generator)
    assert isinstance(warm.kernel, Preconditioned)
    warm_up = 10 * num_warmup * num_chains
    step_size = float(warm.kernel.step_size)

    def measured(name: str, kernel: Kernel, training_gradients: int) -> Result:
        generator = seeded_generator("cpu", seed, 1)
        chains = sample(kernel, energy, warm.position, num_steps, generator=generator)
        return result(name, chains.draws, kernel.num_leapfrogs, training_gradients)

    results = [
        measured(
            f"HMC, leapfrogs: {length}", warm.kernel.with_kernel(HMC(length, step_size)), warm_up
        )
        for length in (1, 2, 3)
    ]
    torch.manual_seed(seed)
    learned = warm.kernel.with_kernel(L2HMC(energy.dim, 3, step_size))
    settings = TrainingSettings(num_iterations, num_chains, seed=seed)
    train_sampler(learned, energy, lambda count, _: warm.position[:count], settings)
    training = num_iterations * (learned.num_leapfrogs + 1) * num_chains
    results.append(measured("L2HMC, leapfrogs: 3", learned, warm_up + training))
    if nuts_is_installed():
        check_density(energy.log_density, energy, start)
        chains, cost, _ = sample_with_nuts(
            energy.log_density, warm.position, num_steps, seed, "dense"
        )
        gradients = cost.gradients_per_step
        results.append(result("NUTS, blackjax", chains.draws, gradients, cost.training_gradients))
    else:
        print("There is no row for NUTS: blackjax is not installed (the extra bench).")
    return results


def main(
    num_chains: int = 100,
    num_warmup: int = 500,
    num_iterations: int = 2000,
    num_steps: int = 1000,
    seed: int = 0,
) -> list[Result]:
    """Sample, and print a table.

    Args:
        num_chains: Of every sampler.
        num_warmup: Steps in which HMC adapts its step size and mass.
        num_iterations: Of the training of L2HMC.
        num_steps: Draws of each chain.
        seed: Of all randomness.
    """
    results = run(num_chains, num_warmup, num_iterations, num_steps, seed)
    reference = results[-1]
    table = Table(title=f"{num_chains} chains of {num_steps} draws, {len(reference.mean)} weights")
    columns = ("", "bulk ESS", "tail ESS", "R̂", "mean", "std", "before")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for one in results:
        worst = one.summary.worst()
        error = (one.summary.mcse**2 + reference.summary.mcse**2).sqrt()
        table.add_row(
            one.sampler,
            f"{1000 * float(worst.ess_bulk) / one.gradients:.1f}",
            f"{1000 * float(worst.ess_tail) / one.gradients:.1f}",
            f"{float(worst.r_hat):.4f}",
            f"{float(((one.mean - reference.mean) / error).abs().max()):.1f}",
            f"{float((one.deviation / reference.deviation - 1).abs().max()):.1%}",
            f"{one.training_gradients:.2g}",
        )
    console = Console()
    console.print(table)
    console.print(
        "Effective sample sizes per 1,000 gradients, and R̂: of the worst weight. Mean, std: the "
        f"largest distance from {reference.sampler} over the weights, in standard errors and in "
        "percent. Before: gradients of warm-up and training, over all chains.",
        highlight=False,
    )
    return results


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
