"""Annealing between a Gaussian and the posterior of a generative model."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dglm.gaussian import DiagonalGaussian, gaussian_log_prob
from dglm.model import GenerativeModel
from samplers import HMC, Energy, State, value_and_gradient
from samplers.adaptation import track_acceptance

Schedule = Literal["sigmoid", "linear"]

_SIGMOID_RADIUS = 4.0
_PILOT_TEMPERATURES = 200
_PILOT_WARM_UP = 50
_PILOT_GAIN = 0.2
_MEMORY_BUDGET = 2**30


class AnnealedEnergy:
    r"""The geometric path from a Gaussian q₀ to the posterior.

    .. math:: U_β(z) = -(1 - β) \log q_0(z) - β \log p(x, z)

    Prior and q₀ are Gaussians in closed form, so a state keeps -log p(x|z) and its gradient apart,
    as its ``extra``, and a change of β costs no gradient.

    Arguments:
        misfit: z ↦ -log p(x|z), the part that costs a decoder pass.
        start: q₀; each row a Gaussian.
    """

    def __init__(self, misfit: Energy, start: DiagonalGaussian) -> None:
        self.misfit = misfit
        self.start = start
        self._exact_start = DiagonalGaussian(*(part.double() for part in start))
        self._precision = (-2 * start.log_std).exp()
        self.beta = 0.0

    @property
    def beta(self) -> float:
        """The inverse temperature β."""
        return float(self._beta)

    @beta.setter
    def beta(self, beta: float) -> None:
        # Tensors all, β too: a compiled kernel would be compiled again for each new number.
        mean, log_std = self.start
        self._beta = torch.full((), beta, dtype=mean.dtype, device=mean.device)  # no host sync
        self._stiffness = (1 - beta) * self._precision
        normaliser = 0.5 * math.log(2 * math.pi) * mean.shape[1]
        self._constant = (1 - beta) * log_std.sum(dim=-1) + normaliser

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
        return gaussian_log_prob(z) - misfit - self._exact_start.log_prob(z)

    def _combine(self, z: Tensor, misfit: Tensor, misfit_gradient: Tensor) -> State:
        # Around the mean of q₀: the squares of a narrow one, expanded, would cancel in float32.
        away = z - self.start.mean
        to_start, to_prior = self._stiffness * away, self._beta * z
        squares = torch.linalg.vecdot(away, to_start) + torch.linalg.vecdot(z, to_prior)
        energy = torch.addcmul(0.5 * squares + self._constant, self._beta, misfit)
        gradient = torch.addcmul(to_start + to_prior, self._beta, misfit_gradient)
        return State(z, energy, gradient, (misfit, misfit_gradient))


class Annealed(NamedTuple):
    """What one pass along the temperatures leaves."""

    log_weight: Tensor
    """Σ_t (β_t - β_{t-1}) (log p(x, z) - log q₀(z)) in float64, (B,) nats."""
    acceptance: Tensor
    """Mean acceptance probability of each chain, (B,)."""


def temperatures(count: int, schedule: Schedule = "sigmoid") -> Tensor:
    """Return the inverse temperatures β_0 = 0 < … < β_count = 1, (count + 1,), float64.

    "sigmoid" places them evenly on a logistic curve from -4 to 4, close together at both ends.

    Raises:
        ValueError: ``count`` is below 1 or the schedule is unknown.

    References:
        On the quantitative analysis of decoder-based generative models (Wu, Burda, Salakhutdinov
        and Grosse, 2017), Section 4.
    """
    if count < 1:
        raise ValueError(f"num_temperatures must be at least 1, got {count}")
    if schedule == "linear":
        return torch.linspace(0, 1, count + 1, dtype=torch.float64)
    if schedule != "sigmoid":
        raise ValueError(f"the schedule must be 'sigmoid' or 'linear', got {schedule!r}")
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
        position: Exact draws at ``betas[0]``, (B, D).
        betas: Inverse temperatures, (T + 1,).
        kernel: Its step size is set at each temperature.
        step_sizes: ε at each inner temperature, (T - 1,).
        generator: Of the noise.
        progress: Called with the number of gradients of each chain since the last call.
    """
    energy.beta = float(betas[0])
    state = energy.value_and_gradient(position)
    progress(1)
    log_weight = torch.zeros(len(position), dtype=torch.float64, device=position.device)
    acceptance = torch.zeros_like(state.energy)
    changes, inner = betas.diff().tolist(), betas[1:-1].tolist()
    log_step_sizes = step_sizes.log().to(position)
    for index, beta in enumerate(inner):
        log_weight += changes[index] * energy.slope(state)
        state = energy.at(beta, state)
        kernel.log_step_size.copy_(log_step_sizes[index])
        state, info = kernel.step(state, energy, kernel.noise(state, generator))
        acceptance += info.acceptance
        progress(kernel.num_leapfrogs)
    log_weight += changes[-1] * energy.slope(state)
    return Annealed(log_weight, acceptance / max(len(inner), 1))


def tune_step_sizes(
    energy: AnnealedEnergy,
    betas: Tensor,
    num_leapfrogs: int,
    generator: torch.Generator,
    progress: Callable[[int], None] = lambda gradients: None,
) -> Tensor:
    """Return a step size for each inner temperature whose acceptance is near 0.65.

    A pilot run that anneals like the real one, its step size following the mean acceptance over
    all chains, on at most 200 of the temperatures; the others are interpolated. Its draws are
    thrown away: a step size that depends on the chain it moves would bias the weights.

    Arguments:
        energy: The path for the pilot's chains.
        betas: Inverse temperatures from 0 to 1, (T + 1,).
        num_leapfrogs: Leapfrogs a transition.
        generator: Of the pilot's noise, another than the real run's.
        progress: Called with the number of gradients of each chain since the last call.

    Returns:
        Step sizes, (T - 1,), float64 on the CPU.
    """
    inner = betas[1:-1]
    if len(inner) == 0:
        return torch.ones(0, dtype=torch.float64)
    count, steps_each = _pilot_sizes(len(inner))
    chosen = torch.linspace(0, len(inner) - 1, count).round().long()
    kernel = HMC(num_leapfrogs).to(energy.start.mean)
    energy.beta = 0.0
    state = energy.value_and_gradient(energy.start.sample(generator))
    progress(1)
    found: list[Tensor] = []
    for index in chosen.tolist():
        state = energy.at(float(inner[index]), state)
        for _ in range(steps_each if found else _PILOT_WARM_UP):
            state, info = kernel.step(state, energy, kernel.noise(state, generator))
            track_acceptance(kernel, info.acceptance, gain=_PILOT_GAIN)
            progress(num_leapfrogs)
        found.append(kernel.log_step_size.clone())
    return _interpolate(chosen, torch.stack(found).double().cpu(), len(inner)).exp()


def pilot_gradients(num_temperatures: int, num_leapfrogs: int) -> int:
    """Return the gradients that :func:`tune_step_sizes` takes for each chain."""
    if num_temperatures == 1:
        return 0
    count, steps_each = _pilot_sizes(num_temperatures - 1)
    return 1 + num_leapfrogs * (_PILOT_WARM_UP + (count - 1) * steps_each)


def _pilot_sizes(transitions: int) -> tuple[int, int]:
    """Return how many temperatures the pilot visits and its steps at each."""
    count = min(transitions, _PILOT_TEMPERATURES)
    return count, -(-_PILOT_TEMPERATURES // count)


def _interpolate(places: Tensor, values: Tensor, count: int) -> Tensor:
    """Interpolate ``values`` at the increasing ``places`` to 0 … count - 1, linearly."""
    wanted = torch.arange(count)
    right = torch.searchsorted(places, wanted).clamp(1, max(len(places) - 1, 1))
    if len(places) == 1:
        return values.expand(count).clone()
    low, high = places[right - 1], places[right]
    share = (wanted - low) / (high - low)
    return values[right - 1] + share * (values[right] - values[right - 1])


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


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Return log((1/C) Σ exp(w)) over the last dimension."""
    return log_weights.logsumexp(dim=-1) - math.log(log_weights.shape[-1])


def log_mean_standard_error(log_weights: Tensor) -> Tensor:
    r"""Return the standard error of the log of a mean weight, by the delta method.

    .. math:: \mathrm{se} = \frac{\mathrm{sd}(w)}{\bar w \sqrt{C}}

    Arguments:
        log_weights: (N, C); NaN for a single chain, which has no spread.
    """
    if log_weights.shape[-1] == 1:
        return torch.full_like(log_weights[..., 0], torch.nan)
    ratios = (log_weights - log_mean_exp(log_weights)[..., None]).exp()
    return ratios.std(dim=-1) / math.sqrt(log_weights.shape[-1])


def weight_effective_sample_size(log_weights: Tensor) -> Tensor:
    """Return (Σw)² / Σw² over the last dimension, for log-weights."""
    return (2 * log_weights.logsumexp(dim=-1) - (2 * log_weights).logsumexp(dim=-1)).exp()
