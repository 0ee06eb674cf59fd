"""From an energy to a kernel that mixes, in one call."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from samplers.adaptation import Moments, adapt, mass_factor, settle
from samplers.chains import draw_chains
from samplers.comparison import efficiency, race, tune_hmc
from samplers.energy import Counted, Energy, Tempered
from samplers.flows import Flow, Independence, fit_flow
from samplers.hmc import HMC
from samplers.io import Resumable
from samplers.kernel import Kernel, as_positions
from samplers.l2hmc import L2HMC
from samplers.learned import Learned, learned_of, packed, unpacked
from samplers.preconditioned import Preconditioned, Transformed
from samplers.random import mixed_seed, seeded_generator
from samplers.training import TrainingSettings, train_sampler
from samplers.turns import Turns

BUDGET = 8_000_000
"""Gradients, over all chains, that the stages take about by default."""

_CHAINS = 100
_WARM_UP_LEAPFROGS = 5
_HIDDEN = 40
_APART = 1.05
"""R̂ of the warm-up's HMC from which on there may be several modes: training is annealed."""
_FLOW_GAIN = 0.02
"""Nats a held-out draw by which a flow must be ahead of a Gaussian to be tried."""
_FLOW_DRAWS = 80
_WIDER_DRAWS = 20
"""Beside those, of a wider density: where a flow proposes next to nothing, a chain may stay for
thousands of steps (a defensive mixture: Hesterberg, 1995)."""
_GAUSSIAN = 0.8
"""Acceptance of proposals from N(μ, Σ) from which on a flow has nothing to gain."""


def learn(
    energy: Energy,
    position: Tensor,
    *,
    budget: int = BUDGET,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Learned:
    """Learn a kernel for an energy: never worse than the HMC of its own warm-up.

    Settling, a warm-up with a dense mass, a race of HMC over lengths and step sizes; then training
    by :func:`samplers.objective.siblings` of L2HMC with one leapfrog, with HMC's length up to
    three, and in the coordinates of a flow where that fits better than a Gaussian; where HMC's
    chains do not agree, from a temperature of ten, and the first of them twice. In the last race,
    from wider starts and with equal gradients, HMC gives way only to what is surely better.

    Arguments:
        energy: U, from (B, D) to (B,).
        position: Where chains start, (chain, dim), on the device to work on: spread over all that
            may have mass, every mode that is known. A hundred chains run, from rows evenly over
            these.
        budget: Gradients, over all chains, to spend about; at least a tenth of the default, which
            comes to two or three times as many, as stages have least lengths.
        seed: Of all randomness.
        checkpoint: A folder to save finished stages and trainings in and to go on from.
        progress: Show a bar of gradients.

    Raises:
        ValueError: The budget is too small, the energy or its gradient is not finite where a chain
            starts, or the checkpoint is of another target, seed or budget.

    Example:
        >>> import torch
        >>> from samplers import learn, sample
        >>> energy = lambda x: 0.5 * (x / torch.tensor([0.1, 10.0])).square().sum(dim=-1)
        >>> learned = learn(energy, torch.randn(20, 2), budget=800_000)  # doctest: +SKIP
        >>> print(learned.table, learned.message)  # doctest: +SKIP
        >>> chains = sample(learned.kernel, energy, learned.position, 1000)  # doctest: +SKIP
    """
    if budget < BUDGET // 10:
        raise ValueError(f"budget must be at least {BUDGET // 10} gradients, got {budget}")
    position = as_positions(position)
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("learn", total=budget)

        def told(gradients: int) -> None:
            bar.update(task, advance=gradients)

        def named(stage: str) -> None:
            bar.update(task, description=stage)

        counted = Counted(energy, told)
        folder = None if checkpoint is None else Path(checkpoint)
        with torch.no_grad():
            return _Learning(counted, position, budget / BUDGET, seed, folder, named).run()


class _Learning:
    """The stages of :func:`learn`; each starts from what plain data the ones before returned."""

    def __init__(
        self,
        energy: Counted,
        position: Tensor,
        share: float,
        seed: int,
        folder: Path | None,
        named: Callable[[str], None],
    ) -> None:
        self.energy, self.share, self.seed, self.named = energy, share, seed, named
        rows = torch.arange(_CHAINS, device=position.device) * len(position) // _CHAINS
        self.start = position.detach()[rows]
        self.dim, self.seconds = position.shape[1], 0.0
        self.folder = folder
        values = HMC().to(self.start).init(self.start[:8], energy).energy
        identity = {"seed": seed, "share of the budget": share, "target, by U": values}
        self.kept = Resumable(None if folder is None else folder / "stages.pt", identity)
        self.done = self.kept.load() or {}
        for stage in self.done.values():
            if "position" in stage:
                stage["position"] = stage["position"].to(self.start)

    def run(self) -> Learned:
        """Go through all stages."""
        warm = self._stage("warm-up", self._warm_up)
        tuned = self._stage("HMC", lambda: self._tune(warm))
        before = tuned["gradients"]
        hmc, position = unpacked(tuned["kernel"], warm["position"]), warm["position"]
        assert isinstance(hmc, Preconditioned)
        kernels: dict[str, Kernel] = {"HMC": hmc}
        independence = hmc.with_kernel(Independence()).to(position)
        for length in sorted({1, min(3, hmc.num_leapfrogs)}):
            found = self._stage(
                f"training, {length} leapfrog{'s' if length > 1 else ''}",
                partial(self._affine, hmc, position, length, tuned["apart"]),
            )
            learned = unpacked(found["kernel"], position)
            name = "learned" if length == 1 else f"learned, {length} leapfrogs"
            kernels[name] = learned
            kernels[f"{name}, in turns with HMC"] = Turns([learned, hmc])
        whitened = kernels["learned"]
        assert isinstance(whitened, Preconditioned)
        gaussian = whitened.with_kernel(Independence()).to(position)
        if self.dim > 1:
            found = self._stage("flow", lambda: self._in_flow(hmc, gaussian, position))
            if found["gain"] > _FLOW_GAIN:
                learned = unpacked(found["kernel"], position)
                assert isinstance(learned, Flow)
                leapfrog = hmc.with_kernel(HMC(1, float(hmc.step_size))).to(position)
                proposals = learned.with_kernel(Independence().to(position))
                kernels["learned in a flow"] = learned
                kernels["learned in a flow, in turns with a leapfrog"] = Turns([learned, leapfrog])
                kernels["independence, from a flow"] = proposals
        kernels["independence"] = independence
        last = self._stage("last race", lambda: self._race(kernels, position))
        return learned_of(kernels, last, position, last["gradients"] - before)

    def _warm_up(self) -> dict[str, Any]:
        position = settle(self.energy, self.start, generator=self._generator("settle"))
        warm = adapt(
            HMC(_WARM_UP_LEAPFROGS, 0.1).to(position),
            self.energy,
            position,
            self._scaled(400),
            mass="dense",
            generator=self._generator("warm-up"),
        )
        return {"kernel": packed(warm.kernel), "position": warm.position}

    def _tune(self, warm: dict[str, Any]) -> dict[str, Any]:
        kernel, position = unpacked(warm["kernel"], warm["position"]), warm["position"]
        assert isinstance(kernel, Preconditioned)
        generator = self._generator("HMC")
        hmc = tune_hmc(kernel, self.energy, position, self._scaled(150), generator)
        steps = max(100, self._scaled(1000) // hmc.num_leapfrogs)
        draws = draw_chains(hmc, self.energy, position, steps, generator=generator).draws
        return {"kernel": packed(hmc), "apart": not efficiency(draws).r_hat <= _APART}

    def _affine(
        self, hmc: Preconditioned, position: Tensor, length: int, apart: bool
    ) -> dict[str, Any]:
        """Train in the warm-up's coordinates; where modes lie apart, twice, for the better one.

        Some trainings with one leapfrog end in a kernel whose proposals mostly stay in their mode.
        """
        best = self._trained(hmc, position, length, apart)
        if apart and length == 1:
            again = self._trained(hmc, position, length, apart, ".again")
            best = max(best, again, key=lambda kernel: self._worth(kernel, position))
        return {"kernel": packed(best)}

    def _trained(
        self, hmc: Preconditioned, position: Tensor, length: int, apart: bool, attempt: str = ""
    ) -> Preconditioned:
        """Train from ε = 1 with one leapfrog, else from HMC's."""
        one = length == 1
        kernel = hmc.with_kernel(self._l2hmc(length, 1.0 if one else float(hmc.step_size), attempt))
        iterations = self._scaled(3000 if one else 800)
        settings = TrainingSettings(
            iterations,
            _CHAINS,
            initial_temperature=10.0 if apart else 1.0,
            annealing_iterations=iterations // 2 if apart else 0,
            learning_rate=0.01 if one else 0.005,
            seed=mixed_seed(self.seed, f"learn.training{attempt}", length),
        )
        self._train(kernel, position, settings, f"training-{length}{attempt}.pt")
        return kernel

    def _worth(self, kernel: Kernel, position: Tensor) -> float:
        """Return independent draws a step, in the worst coordinate of x and x²."""
        generator, steps = self._generator("attempts"), self._scaled(500)
        chains = draw_chains(kernel, self.energy, position, steps, generator=generator)
        return efficiency(chains.draws).worst

    def _in_flow(self, hmc: Preconditioned, gaussian: Kernel, position: Tensor) -> dict[str, Any]:
        """Fit a flow to HMC's draws and train in it; then again, to draws of both, some wider.

        Not where the proposals of a Gaussian are as good.
        """
        generator = self._generator("flow")
        tried = draw_chains(gaussian, self.energy, position, 50, generator=generator)
        if tried.acceptance.mean() > _GAUSSIAN:
            return {"gain": 0.0}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, "learn.flow"))
            flow = Flow(self._l2hmc(1, 1.0), hmc.location, hmc.factor).to(position)
        mover: Kernel = hmc
        for name, iterations in (("first", 400), ("second", 800)):
            thin = max(1, self._scaled(2000) // (_FLOW_DRAWS * mover.num_leapfrogs))
            chains = draw_chains(
                mover, self.energy, position, _FLOW_DRAWS, thin=thin, generator=generator
            )
            draws = chains.draws
            if name == "second":
                wider = self._wider(mover, position, _WIDER_DRAWS, thin, generator)
                draws = torch.cat([draws, wider], dim=1)
            draws = draws.flatten(0, 1).to(position)
            moments = Moments.of(draws)
            flow.location.copy_(moments.mean)
            flow.factor.copy_(mass_factor(moments, len(draws), "dense"))
            gain = fit_flow(flow, draws, self._scaled(1500), generator=generator)
            if gain <= _FLOW_GAIN:
                return {"gain": gain}
            settings = TrainingSettings(
                self._scaled(iterations), _CHAINS, seed=mixed_seed(self.seed, "learn.flow", name)
            )
            ends = chains.draws[:, -1].to(position)
            self._train(flow, ends, settings, f"training-flow-{name}.pt")
            mover = Turns([flow, hmc])
        return {"gain": gain, "kernel": packed(flow)}

    def _wider(
        self,
        kernel: Kernel,
        position: Tensor,
        num_draws: int,
        thin: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Draw as at a higher temperature, after as many draws as it takes to get there.

        A Gaussian's energy is higher there by one of its standard deviations.
        """
        temperature = position.new_tensor(1 + math.sqrt(2 / self.dim))
        tempered, count = Tempered(self.energy, temperature), 2 * num_draws
        chains = draw_chains(kernel, tempered, position, count, thin=thin, generator=generator)
        return chains.draws[:, num_draws:]

    def _race(self, kernels: dict[str, Kernel], position: Tensor) -> dict[str, Any]:
        """Race from starts that are wider than the target, where a kernel could stay for long."""
        generator, hmc = self._generator("race"), kernels["HMC"]
        thin = max(1, self._scaled(150) // hmc.num_leapfrogs)
        wider = self._wider(hmc, position, 1, thin, generator)[:, 0].to(position)
        raced = race(kernels, self.energy, wider, self._scaled(2000), generator)
        return {**raced._asdict(), "table": dict(raced.table), "converged": raced.converged}

    def _l2hmc(self, length: int, step_size: float, attempt: str = "") -> L2HMC:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, f"learn.kernel{attempt}", length))
            kernel = L2HMC(self.dim, length, step_size, hidden=_HIDDEN)
        return kernel.to(self.start)

    def _train(
        self, kernel: Transformed, position: Tensor, settings: TrainingSettings, name: str
    ) -> None:
        file, before = None if self.folder is None else self.folder / name, self.energy.count
        kernel.kernel.requires_grad_(True)
        with torch.enable_grad():
            train_sampler(
                kernel, self.energy, lambda count, _: position[:count], settings, checkpoint=file
            )
        kernel.kernel.requires_grad_(False)
        # Not as counted, for iterations before a kill were not: chains at the start of each, and
        # of two siblings each leapfrog and the two ends of its curvature.
        each = 1 + 6 * kernel.num_leapfrogs
        self.energy.count = before + _CHAINS * (1 + settings.num_iterations * each)

    def _scaled(self, count: int) -> int:
        return max(30, round(self.share * count))

    def _generator(self, stage: str) -> torch.Generator:
        return seeded_generator(self.start.device, self.seed, f"learn.{stage}")

    def _stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what a stage returns, and what all cost so far; from the checkpoint if there."""
        self.named(name)
        if name not in self.done:
            began, before = time.perf_counter(), self.seconds
            content = work()
            seconds = before + time.perf_counter() - began
            self.done[name] = {**content, "gradients": self.energy.count, "seconds": seconds}
            self.kept.save(self.done)
        self.energy.count, self.seconds = (self.done[name][k] for k in ("gradients", "seconds"))
        return self.done[name]
