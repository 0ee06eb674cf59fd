"""NUTS of blackjax as an outside reference, where the extra ``bench`` is installed."""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from samplers import Chains
from samplers.posteriors import (
    EightSchools,
    GaussianProcess,
    LogisticRegression,
    StochasticVolatility,
)
from samplers.targets import Banana, Funnel, GaussianMixture, GaussianTarget, RoughWell

_WARM_UP_STEPS = 1000


@dataclass(frozen=True)
class Cost:
    """What a sampler's draws took.

    Args:
        gradients_per_step: Gradients of the energy for one step of one chain.
        seconds: Of all steps of all chains.
        training_gradients: Gradients for tuning, over all chains.
        training_seconds: Seconds of tuning.
    """

    gradients_per_step: float
    seconds: float
    training_gradients: int
    training_seconds: float


def nuts_is_installed() -> bool:
    """Whether blackjax is there."""
    return importlib.util.find_spec("blackjax") is not None


def run_nuts(
    target: nn.Module, start: Tensor, num_steps: int, seed: int
) -> tuple[Chains, Cost, str]:
    """Sample a target with :func:`sample_with_nuts`.

    Raises:
        ValueError: The density in JAX differs from the target's.
    """
    log_density = _log_density(target)
    check_density(log_density, target, start)
    return sample_with_nuts(log_density, start, num_steps, seed)


def sample_with_nuts(
    log_density: Callable[[Any], Any],
    start: Tensor,
    num_steps: int,
    seed: int,
    mass: Literal["diagonal", "dense"] = "diagonal",
) -> tuple[Chains, Cost, str]:
    """Sample with blackjax's NUTS, its window adaptation run on one chain beforehand.

    Compiling counts neither as training nor as sampling time.

    Arguments:
        log_density: log p of one point, for JAX.
        start: Where the chains start, (chain, D).
        num_steps: Draws of each chain.
        seed: Of all randomness.
        mass: What is adapted beside the step size.
    """
    import blackjax
    import jax

    position = jax.numpy.asarray(start.numpy())
    warm_up_key, run_key = jax.random.split(jax.random.key(seed))
    adaptation = blackjax.window_adaptation(
        blackjax.nuts, log_density, is_mass_matrix_diagonal=mass == "diagonal"
    )

    def warm_up(key: Any) -> Any:
        return adaptation.run(key, position[0], _WARM_UP_STEPS)

    ((_, parameters), trace), warm_up_seconds = _compiled_and_timed(warm_up, warm_up_key)
    gradients = int(trace.info.num_integration_steps.sum())
    nuts = blackjax.nuts(log_density, **parameters)

    def run(state: Any, key: Any) -> Any:
        def step(state: Any, key: Any) -> Any:
            state, info = jax.vmap(nuts.step)(jax.random.split(key, len(position)), state)
            kept = info.acceptance_rate, info.is_divergent, info.num_integration_steps
            return state, (state.position, -state.logdensity, *kept)

        return jax.lax.scan(step, state, jax.random.split(key, num_steps))[1]

    state = jax.vmap(nuts.init)(position)
    fields, seconds = _compiled_and_timed(run, state, run_key)
    *kept, integration_steps = (torch.from_numpy(np.array(field)) for field in fields)
    chains = Chains(*(field.transpose(0, 1) for field in kept))
    cost = Cost(float(integration_steps.float().mean()), seconds, gradients, warm_up_seconds)
    return chains, cost, f"ε {float(parameters['step_size']):.3g}, adapted {mass} mass"


def _compiled_and_timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return the result of some work in JAX, and its seconds without compiling."""
    import jax

    compiled = jax.jit(work).lower(*arguments).compile()
    began = time.perf_counter()
    result = jax.block_until_ready(compiled(*arguments))
    return result, time.perf_counter() - began


def check_density(
    log_density: Callable[[Any], Any], energy: Callable[[Tensor], Tensor], start: Tensor
) -> None:
    """Raise ValueError where log p in JAX is not minus U, up to a constant."""
    import jax

    there = torch.from_numpy(np.array(jax.vmap(log_density)(start.numpy())))
    here = energy(start)
    difference = -there - here
    if (difference - difference.mean()).abs().max() > 1e-3 * here.abs().max():
        raise ValueError(f"the density of {type(energy).__name__} in JAX is another one")


def _log_density(target: nn.Module) -> Callable[[Any], Any]:
    """Return log p of one point, for JAX."""
    import jax.numpy as jnp
    from jax.scipy.special import logsumexp

    if isinstance(target, GaussianTarget):
        precision = jnp.asarray(torch.linalg.inv(target.covariance).float().numpy())
        mean = jnp.asarray(target.mean.float().numpy())
        return lambda x: -0.5 * (x - mean) @ precision @ (x - mean)
    if isinstance(target, GaussianMixture):
        means, variances = target.centres.float().numpy(), target.variances.float().numpy()
        constant = target.weights.log().numpy() - 0.5 * target.dim * np.log(variances)
        return lambda x: logsumexp(constant - 0.5 * jnp.square(x - means).sum(axis=-1) / variances)
    if isinstance(target, RoughWell):
        return lambda x: -jnp.sum(0.5 * x**2 + target.amplitude * jnp.cos(x / target.width))
    if isinstance(target, Funnel):
        return lambda x: (
            -(
                x[0] ** 2 / 18
                + 0.5 * (target.dim - 1) * x[0]
                + 0.5 * jnp.exp(-x[0]) * (x[1:] @ x[1:])
            )
        )
    if isinstance(target, Banana):
        variance, curvature = target.variance, target.curvature
        return lambda x: (
            -0.5 * x[0] ** 2 / variance - 0.5 * (x[1] - curvature * (x[0] ** 2 - variance)) ** 2
        )
    return _log_posterior(target)


def _log_posterior(target: nn.Module) -> Callable[[Any], Any]:
    import jax
    import jax.numpy as jnp

    data = {name: jnp.asarray(value.float().numpy()) for name, value in target.named_buffers()}

    def log_regression(w: Any) -> Any:
        return -jnp.sum(jax.nn.softplus(-data["signed"] @ w)) - 0.5 * w @ w

    def log_schools(x: Any) -> Any:
        mean, scale, rest = x[0], jnp.exp(x[1]), x[2:]
        theta = rest if target.centred else mean + scale * rest
        white = (rest - mean) / scale if target.centred else rest
        misfit = (data["effects"] - theta) / data["errors"]
        prior = -0.5 * (mean / 5) ** 2 - jnp.log1p((scale / 5) ** 2) + x[1]
        volume = -8 * x[1] if target.centred else 0.0
        return prior + volume - 0.5 * (misfit @ misfit + white @ white)

    def log_volatility(x: Any) -> Any:
        mean, raw, log_scale, z = x[0], x[1], x[2], x[3:]
        persistence, scale = jnp.tanh(0.5 * raw), jnp.exp(log_scale)

        def step(level: Any, noise: Any) -> Any:
            level = persistence * level + scale * noise
            return level, level

        first = scale * z[0] * jnp.cosh(0.5 * raw)
        levels = mean + jnp.concatenate([first[None], jax.lax.scan(step, first, z[1:])[1]])
        likelihood = -0.5 * jnp.sum(levels + data["returns"] ** 2 * jnp.exp(-levels))
        prior = 20 * jax.nn.log_sigmoid(raw) + 1.5 * jax.nn.log_sigmoid(-raw)
        return likelihood + prior - 0.5 * (mean**2 + (log_scale + 1.5) ** 2 + z @ z)

    def log_process(x: Any) -> Any:
        exponent = -0.5 * data["distances"] @ jnp.exp(-2 * x[:2]) + 2 * x[2]
        noise = jnp.exp(2 * x[3]) * jnp.eye(len(data["outcome"]))
        factor = jnp.linalg.cholesky(jnp.exp(exponent) + noise)
        white = jax.scipy.linalg.solve_triangular(factor, data["outcome"], lower=True)
        return -0.5 * (white @ white + x @ x) - jnp.sum(jnp.log(jnp.diag(factor)))

    found: dict[type[nn.Module], Callable[[Any], Any]] = {
        LogisticRegression: log_regression,
        EightSchools: log_schools,
        StochasticVolatility: log_volatility,
        GaussianProcess: log_process,
    }
    if type(target) not in found:
        raise ValueError(f"there is no JAX version of {type(target).__name__}")
    return found[type(target)]
