"""The same chains by blackjax, where it is installed (extra ``bench``)."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("blackjax") is not None


class BlackjaxHMC:
    """Hamiltonian Monte Carlo by blackjax, all steps in one compiled scan.

    Arguments:
        log_density: log p of one position (D,) given one observation, in jax.numpy.
        start: (B, D).
        observed: One observation a chain, (B, …).
        step_size: ε.
        leapfrogs: Of one step.
        steps: Of each chain.
    """

    def __init__(
        self,
        log_density: Callable[[Any, Any], Any],
        start: Tensor,
        observed: Tensor,
        step_size: float,
        leapfrogs: int,
        steps: int,
    ) -> None:
        import blackjax
        import jax

        rows, dim = start.shape
        images = jax.numpy.asarray(observed.numpy())

        def sampler(image: Any) -> Any:
            return blackjax.hmc(
                lambda z: log_density(z, image), step_size, jax.numpy.ones(dim), leapfrogs
            )

        @jax.vmap
        def move(key: Any, state: Any, image: Any) -> Any:
            return sampler(image).step(key, state)

        def step(state: Any, key: Any) -> Any:
            state, info = move(jax.random.split(key, rows), state, images)
            return state, info.acceptance_rate

        self._run = jax.jit(
            lambda state, key: jax.lax.scan(step, state, jax.random.split(key, steps))
        )
        self._state = jax.vmap(lambda z, image: sampler(image).init(z))(
            jax.numpy.asarray(start.numpy()), images
        )
        self._key = jax.random.key(1)

    def energy(self) -> Tensor:
        """Return U at the start, (B,)."""
        return -torch.tensor(self._state.logdensity.tolist())

    def __call__(self) -> object:
        """Run the chains once."""
        import jax

        return jax.block_until_ready(self._run(self._state, self._key))
