"""A kernel learned for one's own posterior, in one call."""

import torch
from jsonargparse import auto_cli
from sklearn.datasets import load_breast_cancer

from samplers import Learned, learn, sample

x, benign = (torch.from_numpy(each).float() for each in load_breast_cancer(return_X_y=True))
x = (x - x.mean(dim=0)) / x.std(dim=0)


def energy(w: torch.Tensor) -> torch.Tensor:
    """Return -log p(w | data) + constant: which tumours are benign, prior N(0, I)."""
    likelihood = torch.distributions.Bernoulli(logits=w @ x.T, validate_args=False)
    return 0.5 * w.square().sum(dim=1) - likelihood.log_prob(benign).sum(dim=1)


def main(budget: int = 8_000_000, seed: int = 0) -> Learned:
    """Learn, print what came out, and sample."""
    start = torch.randn(100, x.shape[1], generator=torch.Generator().manual_seed(seed))
    learned = learn(energy, start, budget=budget, seed=seed)
    print(learned.table, learned.message, sep="\n")
    chains = sample(learned.kernel, energy, learned.position, num_draws=500)
    print(chains.draws.mean(dim=(0, 1)))
    return learned


if __name__ == "__main__":
    auto_cli(main)
