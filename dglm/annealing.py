"""Annealing between a Gaussian and the posterior of a generative model."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dglm.gaussian import DenseGaussian, DiagonalGaussian, UnitMixture, gaussian_log_prob
from dglm.model import GenerativeModel, PosteriorEnergy
from samplers import HMC, Energy, State, value_and_gradient
from samplers.hmc import JITTER

_SIGMOID_RADIUS = 4.0
_PILOT_TEMPERATURES = 100
_PILOT_STEPS, _PILOT_WARM_UP = 50, 10
_PILOT_GAIN = 0.5
_MEMORY_BUDGET = 2**30


class AnnealedEnergy:
    r"""The geometric path from a Gaussian q₀ to the posterior.

    .. math:: U_β(z) = -(1 - β) \log q_0(z) - β \log p(x, z)

    Prior and q₀ are Gaussians in closed form, so a state keeps -log p(x|z) and its gradient apart,
    as its ``extra``, and a change of β costs no gradient.

    Arguments:
        misfit: z ↦ -log p(x|z), the part that costs a decoder pass.
        start: q₀.
    """

    def __init__(self, misfit: Energy, start: DiagonalGaussian | UnitMixture) -> None:
        self.misfit = misfit
        self.start = start
        self._exact_start = start.double()
        self.beta = 0.0

    @property
    def beta(self) -> float:
        """The inverse temperature β."""
        return float(self._beta)

    @beta.setter
    def beta(self, beta: float) -> None:
        # A tensor: a compiled kernel would be compiled again for each new number.
        like = self.start[0]
        self._beta = torch.full((), beta, dtype=like.dtype, device=like.device)  # no host sync

    def value_and_gradient(self, position: Tensor) -> State:
        """Return the state at ``position`` (B, D) for the present β: one gradient evaluation."""
        state = value_and_gradient(self.misfit, position)
        return self._combine(position, state.energy, state.gradient)

    def at(self, beta: float, state: State) -> State:
        """Change to β and return the same positions' state there."""
        self.beta = beta
        return self._combine(state.position, *state.extra)

    def slope(self, state: State) -> Tensor:
        """Return log p(x, z) - log q₀(z), the derivative of -U_β in β, in float64, (B,) nats."""
        z, misfit = state.position.double(), state.extra[0].double()
        return gaussian_log_prob(z) - misfit + self._exact_start.value_and_gradient(z).energy

    def _combine(self, z: Tensor, misfit: Tensor, misfit_gradient: Tensor) -> State:
        start = self.start.value_and_gradient(z)
        end = misfit - gaussian_log_prob(z)
        energy = torch.lerp(start.energy, end, self._beta)
        gradient = torch.lerp(start.gradient, misfit_gradient + z, self._beta)
        return State(z, energy, gradient, (misfit, misfit_gradient))


class WhitenedLikelihood:
    r"""What is left of the posterior's energy in the coordinates of a fitted Gaussian.

    .. math:: -\log \frac{p(x, μ + L w)\, |L|}{\mathcal N(w; 0, I)}

    With N(0, I) as the prior of w, the posterior of w is that of z = μ + L w.
    """

    def __init__(self, energy: PosteriorEnergy, fitted: DenseGaussian, chains: int) -> None:
        self.energy = energy
        self.fitted = fitted
        self.log_determinant = fitted.log_determinant().repeat_interleave(chains)

    def value_and_gradient(self, position: Tensor) -> State:
        """Return the value and the gradient at w (B, D)."""
        state = self.energy.value_and_gradient(self.fitted.colour(position))
        value = state.energy - self.log_determinant + gaussian_log_prob(position)
        return State(position, value, self.fitted.pull(state.gradient) - position)


class Annealed(NamedTuple):
    """What one pass along the temperatures leaves."""

    log_weight: Tensor
    """Σ_t (β_t - β_{t-1}) (log p(x, z) - log q₀(z)) in float64, (B,) nats."""
    acceptance: Tensor
    """Mean acceptance probability of each chain, (B,)."""


def temperatures(count: int) -> Tensor:
    """Return the inverse temperatures β_0 = 0 < … < β_count = 1, (count + 1,), float64.

    They lie evenly on a logistic curve from -4 to 4, close together at both ends.

    Raises:
        ValueError: ``count`` is below 1.

    References:
        On the quantitative analysis of decoder-based generative models (Wu, Burda, Salakhutdinov
        and Grosse, 2017), Section 4.
    """
    if count < 1:
        raise ValueError(f"num_temperatures must be at least 1, got {count}")
    ends = _SIGMOID_RADIUS
    curve = torch.sigmoid(torch.linspace(-ends, ends, count + 1, dtype=torch.float64))
    return (curve - curve[0]) / (curve[-1] - curve[0])


def anneal(
    energy: AnnealedEnergy,
    position: Tensor,
    betas: Tensor,
    kernel: HMC,
    step_sizes: Tensor,
    generator: torch.Generator,
    progress: Callable[[int], None] = lambda gradients: None,
) -> Annealed:
    """Carry chains along the inverse temperatures, one transition at each inner one.

    The weight is taken before each transition; after the last change of temperature none is
    needed. The same function serves the forward chain (β from 0 to 1) and the reverse one (1 to 0).

    Arguments:
        energy: The path.
        position: Exact draws at ``betas[0]``, (n · C, D), the chains of an image one after another.
        betas: Inverse temperatures, (T + 1,).
        kernel: Its step sizes are set at each temperature.
        step_sizes: The largest ε of each image at each inner temperature, (T - 1, n).
        generator: Of the noise.
        progress: Called with the number of gradients of each chain since the last call.
    """
    energy.beta = float(betas[0])
    state = energy.value_and_gradient(position)
    progress(1)
    log_weight = torch.zeros(len(position), dtype=torch.float64, device=position.device)
    acceptance = torch.zeros_like(state.energy)
    changes, inner = betas.diff().tolist(), betas[1:-1].tolist()
    chains = len(position) // max(step_sizes.shape[1], 1)
    kernel.log_step_size = torch.zeros_like(state.energy)[:, None]
    for index, beta in enumerate(inner):
        log_weight += changes[index] * energy.slope(state)
        state = energy.at(beta, state)
        kernel.log_step_size.copy_(step_sizes[index].repeat_interleave(chains).log()[:, None])
        state, info = kernel.step(state, energy, kernel.noise(state, generator))
        acceptance += info.acceptance
        progress(kernel.num_leapfrogs)
    log_weight += changes[-1] * energy.slope(state)
    return Annealed(log_weight, acceptance / max(len(inner), 1))


class Tuned(NamedTuple):
    """What a pilot run leaves."""

    step_sizes: Tensor
    """The largest ε of each image at each inner temperature, (T - 1, n)."""
    position: Tensor
    """Where its chains end, near draws of the posterior, (n · C, D)."""


def tune_step_sizes(
    energy: AnnealedEnergy,
    betas: Tensor,
    num_leapfrogs: int,
    chains: int,
    generator: torch.Generator,
    progress: Callable[[int], None] = lambda gradients: None,
) -> Tuned:
    """Find the step sizes of each image whose acceptance is near 0.65 at each temperature.

    A pilot run that anneals like the real one, each image's step size following the mean acceptance
    of its chains, on at most 100 of the temperatures; the others are interpolated. Its draws do
    not count: a step size that depends on the chain it moves would bias the weights.

    Arguments:
        energy: The path for the pilot's chains, (n · C, D).
        betas: Inverse temperatures from 0 to 1, (T + 1,).
        num_leapfrogs: Leapfrogs a transition.
        chains: C, of each image, one after another.
        generator: Of the pilot's noise, another than the real run's.
        progress: Called with the number of gradients of each chain since the last call.
    """
    inner = betas[1:-1]
    position = energy.start.sample(generator)
    if len(inner) == 0:
        return Tuned(position.new_ones(0, len(position) // chains), position)
    count, steps_each = _pilot_sizes(len(inner))
    chosen = torch.linspace(0, len(inner) - 1, count).round().long()
    energy.beta = 0.0
    state = energy.value_and_gradient(position)
    progress(1)
    each = len(position) // chains, chains, position.shape[1]
    tuning = StepSizes(num_leapfrogs, likely_step_sizes(state, each), chains)
    found: list[Tensor] = []
    for index in chosen.tolist():
        state = energy.at(float(inner[index]), state)
        for _ in range(steps_each if found else _PILOT_WARM_UP):
            state = tuning.step(state, energy, generator)
            progress(num_leapfrogs)
        found.append(tuning.log_step_size.clone())
    return Tuned(_interpolate(chosen, torch.stack(found), len(inner)).exp(), state.position)


def likely_step_sizes(state: State, shape: tuple[int, int, int]) -> Tensor:
    """Return log ε of each of n images, (n,): the width of a Gaussian that is as steep.

    Arguments:
        state: Of all chains.
        shape: Images n, chains of each, and coordinates.
    """
    return -0.5 * state.gradient.square().view(shape).mean(dim=(1, 2)).log()


class StepSizes:
    r"""HMC whose largest step size of each image follows the acceptance of that image's chains.

    .. math:: \log ε_i ← \log ε_i + γ (\bar A_i - A^*)

    Arguments:
        num_leapfrogs: Leapfrogs a step.
        log_step_size: log ε of each image to begin with, (n,).
        chains: C, of each image, one after another.
        target: A*, in (0, 1).
    """

    def __init__(
        self, num_leapfrogs: int, log_step_size: Tensor, chains: int, target: float = 0.65
    ) -> None:
        self.kernel = HMC(num_leapfrogs, jitter=JITTER).to(log_step_size)
        self.log_step_size = log_step_size
        self.chains = chains
        self.target = target

    def step(
        self, state: State, energy: Energy, generator: torch.Generator | None, tune: bool = True
    ) -> State:
        """Take a step of all chains (n · C, D), and follow its acceptance."""
        self.kernel.log_step_size = self.log_step_size.repeat_interleave(self.chains)[:, None]
        state, info = self.kernel.step(state, energy, self.kernel.noise(state, generator))
        if tune:
            error = info.acceptance.view(-1, self.chains).mean(dim=1) - self.target
            self.log_step_size = self.log_step_size + _PILOT_GAIN * error
        return state


def pilot_gradients(num_temperatures: int, num_leapfrogs: int) -> int:
    """Return the gradients that :func:`tune_step_sizes` takes for each chain."""
    if num_temperatures == 1:
        return 0
    count, steps_each = _pilot_sizes(num_temperatures - 1)
    return 1 + num_leapfrogs * (_PILOT_WARM_UP + (count - 1) * steps_each)


def _pilot_sizes(transitions: int) -> tuple[int, int]:
    """Return how many temperatures the pilot visits and its steps at each."""
    count = min(transitions, _PILOT_TEMPERATURES)
    return count, max(1, _PILOT_STEPS // count)


def _interpolate(places: Tensor, values: Tensor, count: int) -> Tensor:
    """Interpolate values (P, n) at the increasing ``places`` (P,) to 0 … count - 1, linearly."""
    if len(places) == 1:
        return values.expand(count, -1).clone()
    wanted = torch.arange(count)
    right = torch.searchsorted(places, wanted).clamp(1, len(places) - 1)
    low, high = places[right - 1], places[right]
    share = ((wanted - low) / (high - low)).to(values)[:, None]
    return torch.lerp(values[right - 1], values[right], share)


def chunks_for_memory(
    model: GenerativeModel, images: Tensor, num_chains: int
) -> list[tuple[int, Tensor]]:
    """Return (first image, images repeated for their chains) in pieces of about a gibibyte.

    One image at least: its chains stay together.

    The pieces depend on the sizes alone, not on the machine, so that results do not either.
    """
    images_each = max(1, _MEMORY_BUDGET // (num_chains * _bytes_per_chain(model, images[:2])))
    return [
        (first, images[first : first + images_each].repeat_interleave(num_chains, dim=0))
        for first in range(0, len(images), images_each)
    ]


def _bytes_per_chain(model: GenerativeModel, images: Tensor) -> int:
    """Return roughly what one more chain takes: twice what autograd saves for one more row."""
    saved = []
    for rows in (1, 2):
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            x = torch.zeros(rows, images.shape[1], dtype=images.dtype, device=images.device)
            z = x.new_zeros(rows, model.latent_dim).requires_grad_()
            model.negative_log_likelihood(x)(z)
        saved.append(total)
    image = images.shape[1] * images.element_size()
    return 2 * (saved[1] - saved[0] + image)


def scaled(progress: Callable[[int], None], chains: int) -> Callable[[int], None]:
    """Turn a count of gradients over all chains into the count of each chain."""
    return lambda gradients: progress(gradients * chains)


def check_counts(**counts: int) -> None:
    """Raise ValueError that names the first count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
