"""What learning a kernel returns: the kernel, and what is known of it."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from samplers.comparison import CONVERGED, Comparison
from samplers.io import build, checked_description, load_plain, save_whole
from samplers.kernel import Kernel


@dataclass(frozen=True)
class Learned:
    """What :func:`learn` returns.

    Args:
        kernel: The best kernel found, frozen and exact: for ``sample(learned.kernel, energy,
            learned.position, …)``.
        position: Where its chains are, (chain, dim).
        chosen: Its name in the table.
        table: The last race: HMC of the warm-up, what was learned, and the independence sampler.
        converged: Whether the chains of the kernel agreed, R̂ ≤ 1.01, and all of them moved. From
            starts that are all in one mode nothing can tell that there is another.
        gradients: Taken over all chains, for everything.
        seconds: That took.
        training_gradients: Of them, those for what goes beyond HMC.
        pays_after: Independent draws, of the worst coordinate, after which that training has paid
            in gradients; infinite where HMC was kept.
        message: All that, in a sentence or two.
        kernels: All that ran in the race, by their names in the table; not saved.
    """

    kernel: Kernel
    position: Tensor
    chosen: str
    table: Comparison
    converged: bool
    gradients: int
    seconds: float
    training_gradients: int
    pays_after: float
    message: str
    kernels: dict[str, Kernel] = field(default_factory=dict, repr=False)

    def save(self, path: str | Path) -> None:
        """Write the kernel and what is known of it into a file that needs no code to be loaded."""
        content = {each.name: getattr(self, each.name) for each in fields(self)[:-1]}
        save_whole(
            {**content, "kernel": packed(self.kernel), "table": dict(self.table)}, Path(path)
        )

    @classmethod
    def load(cls, path: str | Path) -> "Learned":
        """Return what :meth:`save` wrote, on the CPU.

        Raises:
            ValueError: The file is damaged or holds something else.
        """
        content = load_plain(Path(path))
        if content.keys() != {each.name for each in fields(cls)[:-1]}:
            raise ValueError(f"{path} holds no learned kernel")
        kernel, table = unpacked(content["kernel"]), Comparison(content["table"])
        return cls(**{**content, "kernel": kernel, "table": table})


def learned_of(
    kernels: dict[str, Kernel], race: dict[str, Any], position: Tensor, gradients: int
) -> Learned:
    """Return the winner of the last race, after so many gradients of training, and what it says."""
    table, best = Comparison(race["table"]), race["best"]
    own, hmc = (table.row(name)["ess_per_gradient"] for name in (best, "HMC"))
    pays_after = gradients / (1 / hmc - 1 / own) if own > hmc > 0 else float("inf")
    if own > 0 and hmc == 0:
        pays_after = 0.0
    if best == "HMC":
        said = f"Learning does not pay here: HMC, {own:.3g} independent draws a gradient, is kept."
    else:
        said = (
            f"{best}: {own:.3g} independent draws a gradient, HMC {hmc:.3g}; training, "
            f"{gradients:.2g} gradients, has paid after {pays_after:.2g} draws."
        )
    yardstick = table.row("independence")
    if yardstick["r_hat"] <= CONVERGED and yardstick["ess_per_gradient"] >= 0.9 * own:
        said += " A Gaussian is as good: the independence sampler mixes as well."
    if not race["converged"]:
        r_hat = table.row(best)["r_hat"]
        said += (
            f" Nothing converged: R̂ is {r_hat:.3g}, chains do not agree. Do not trust the draws; "
            "start in all modes, or try parallel_tempering or another parametrization."
        )
    return Learned(
        kernels[best],
        race["position"].to(position),
        best,
        table,
        race["converged"],
        race["gradients"],
        race["seconds"],
        gradients,
        pays_after,
        said,
        kernels,
    )


def packed(kernel: Kernel) -> dict[str, Any]:
    """Return a kernel as plain data."""
    return {"description": checked_description(kernel), "state": kernel.state_dict()}


def unpacked(content: dict[str, Any], like: Tensor | None = None) -> Kernel:
    """Return the kernel of plain data, frozen, with the precision it had or that of a tensor."""
    kernel = build(content["description"])
    # Assigned, not copied into: parameters and buffers keep the precision they were saved with.
    state = {name: value.clone() for name, value in content["state"].items()}
    kernel.load_state_dict(state, assign=True)
    if not isinstance(kernel, Kernel):
        raise ValueError(f"the file holds a {type(kernel).__name__}, no kernel")
    kernel.requires_grad_(False)
    return kernel if like is None else kernel.to(like)
