"""Several kernels in turns, as one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samplers.energy import Energy, State
from samplers.kernel import Context, Endpoint, Info, Kernel, Noise, PhasePoint


class Turns(Kernel):
    """A kernel whose step is one step of each of several kernels, one after another.

    It leaves a density invariant that each of them does, though it is not reversible: where one
    kernel is quick in the bulk and another safe in the tails, both are at hand. Adapt and train the
    kernels before: turns have neither one step size nor one proposal.

    Arguments:
        kernels: Each takes its turn in a step.

    Raises:
        ValueError: There are none.
    """

    step_is_one_region = False
    """Each kernel has regions of its own."""

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        super().__init__()
        if not kernels:
            raise ValueError("kernels must be at least one")
        self.kernels = nn.ModuleList(kernels)
        self.num_leapfrogs = sum(kernel.num_leapfrogs for kernel in kernels)

    @property
    def log_step_size(self) -> Tensor:  # type: ignore[override]
        """Log ε of the first kernel."""
        return self.kernels[0].log_step_size  # type: ignore[return-value]

    def noise(self, state: State, generator: torch.Generator | None = None) -> Noise:
        """Draw the randomness of one step: with a leading dimension, one of each kernel."""
        drawn = [kernel.noise(state, generator) for kernel in self._each()]
        return Noise(*(torch.stack(field) for field in zip(*drawn, strict=True)))

    def step(
        self, state: State, energy: Energy, noise: Noise, context: Context = None
    ) -> tuple[State, Info]:
        """Take one step of each kernel; acceptance is their mean, the rest is as of the last.

        A chain counts as diverging where it diverged in any of them.
        """
        infos = []
        for index, kernel in enumerate(self._each()):
            own = Noise(*(field[index] for field in noise))
            state, info = kernel.step(state, energy, own, context)
            infos.append(info)
        acceptance = torch.stack([info.acceptance for info in infos]).mean(dim=0)
        accepted = torch.stack([info.accepted for info in infos]).any(dim=0)
        diverging = torch.stack([info.diverging for info in infos]).any(dim=0)
        return state, Info(infos[-1].proposal, acceptance, accepted, diverging)

    def integrate(self, start: PhasePoint, energy: Energy, context: Context = None) -> Endpoint:
        """Raise TypeError: each turn accepts or rejects by itself."""
        raise TypeError("kernels in turns have no single trajectory: ask each of turns.kernels")

    def _each(self) -> list[Kernel]:
        return list(self.kernels)  # type: ignore[arg-type]
