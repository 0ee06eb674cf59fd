"""What the sampler tests share: double precision, an energy without symmetries, random kernels."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from samplers import L2HMC, Energy, State, value_and_gradient

Fault = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def double_precision_on_one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and lose much on a busy machine."""
    default, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(default)
    torch.set_num_threads(threads)


@pytest.fixture
def energy() -> Callable[[Tensor], Tensor]:
    """A smooth energy of any dimension: skewed, coupled and with a Hessian that varies."""

    def bent(position: Tensor) -> Tensor:
        skewed = (position.exp() - 1.5 * position).sum(dim=-1)
        return skewed + 0.25 * position.sum(dim=-1).square()

    return bent


@pytest.fixture
def random_l2hmc() -> Callable[..., L2HMC]:
    """A builder of untrained kernels in which S, T and Q are far from zero."""

    def build(dim: int, num_leapfrogs: int = 3, *, seed: int = 0, **options: object) -> L2HMC:
        settings: dict = {"step_size": 0.4, "hidden": 16, "head_scale": 4.0, **options}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            kernel = L2HMC(dim, num_leapfrogs, **settings)
            for network in (kernel.position_network, kernel.momentum_network):
                network.heads.bias.normal_(std=0.1)
                network.log_amplitude.normal_(std=0.5)
        return kernel

    return build


class WithExtra:
    """An energy that keeps more of a point than a chain needs."""

    def __init__(self, energy: Energy) -> None:
        self.energy = energy

    def value_and_gradient(self, position: Tensor) -> State:
        state = value_and_gradient(self.energy, position)
        steep, parts = state.gradient[:, 0] > 0, torch.stack([position, -position], dim=-1)
        return state._replace(extra=(position.sum(dim=-1), steep, parts))


@pytest.fixture
def with_extra(energy: Energy) -> WithExtra:
    return WithExtra(energy)


FAULTS: dict[str, Fault] = {
    "nan": lambda value, root: value * torch.nan,
    "inf": lambda value, root: value + torch.inf,
    "-inf": lambda value, root: value - torch.inf,
    "outside": lambda value, root: torch.inf + (root - root),
    "nan gradient": lambda value, root: value + (root - root),
    "inf gradient": lambda value, root: value + root,
    "rise": lambda value, root: value + 1100.0,
    "cliff": lambda value, root: value * 1e200,
}


@pytest.fixture
def plant() -> Callable[[Callable[[Tensor], Tensor], str, Tensor, int], Energy]:
    """Plant one of the faults in some rows of one call of an energy; calls count from 0."""

    def plant(energy: Callable[[Tensor], Tensor], fault: str, rows: Tensor, call: int) -> Energy:
        calls = iter(range(1000))

        def faulty(position: Tensor) -> Tensor:
            value = energy(position)
            if next(calls) != call:
                return value
            # The square root of zero has an infinite slope; the other rows take that of one.
            root = torch.where(rows, (position - position.detach()).sum(dim=-1), 1.0).sqrt()
            return torch.where(rows, FAULTS[fault](torch.where(rows, value, 1.0), root), value)

        return faulty

    return plant
