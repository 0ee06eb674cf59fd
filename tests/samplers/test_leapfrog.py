from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from samplers import Energy, State, value_and_gradient
from samplers.leapfrog import Update, affine, augmented_leapfrog, leapfrogs

SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)


def random_update(*like: Tensor) -> Update:
    """S, T and Q as some fixed smooth functions of the inputs."""
    mixed = torch.stack([(1.3 + i) * x.roll(i, dims=-1) for i, x in enumerate(like)]).sum(dim=0)
    return Update(torch.sin(mixed), torch.cos(2 * mixed), torch.sin(3 * mixed + 1))


def no_update(first: Tensor, second: Tensor) -> Update:
    return Update(*(torch.zeros_like(first) for _ in range(3)))


@pytest.fixture
def start(energy: Energy) -> State:
    return value_and_gradient(energy, torch.randn(4, 3))


def test_affine_by_hand() -> None:
    block = torch.tensor([[3.0], [3.0]])
    log_scale, shift = torch.full((2, 1), 0.5), torch.full((2, 1), 2.0)
    moved, change = affine(block, log_scale, shift, torch.tensor([[1.0], [-1.0]]))
    root = torch.tensor(0.5).exp()
    torch.testing.assert_close(moved, torch.stack([3 * root + 2, (3 - 2.0) / root])[:, None])
    assert change.squeeze().tolist() == [0.5, -0.5]


def test_affine_backward_inverts_forward() -> None:
    block, log_scale, shift = torch.randn(3, 4, 3).unbind()
    direction = SIGNS[:, None]
    moved, change = affine(block, log_scale, shift, direction)
    back, change_back = affine(moved, log_scale, shift, -direction)
    torch.testing.assert_close(back, block)
    assert torch.equal(change_back, -change)


@pytest.mark.parametrize("count", [1, 3])
def test_leapfrogs_by_hand(start: State, energy: Callable[[Tensor], Tensor], count: int) -> None:
    momentum, step_size = torch.randn(4, 3), torch.tensor(0.3)
    end, end_momentum = leapfrogs(start, momentum, energy, SIGNS[:, None] * step_size, count)
    signed, position = SIGNS[:, None] * 0.3, start.position
    for _ in range(count):
        half = momentum - signed / 2 * value_and_gradient(energy, position).gradient
        position = position + signed * half
        momentum = half - signed / 2 * value_and_gradient(energy, position).gradient
    torch.testing.assert_close(end.position, position)
    torch.testing.assert_close(end_momentum, momentum)
    torch.testing.assert_close(end.energy, energy(position))


def test_leapfrog_backward_is_forward_with_the_momentum_flipped(
    start: State, energy: Energy
) -> None:
    momentum, step_size = torch.randn(4, 3), torch.tensor(0.3)
    end, end_momentum = leapfrogs(start, momentum, energy, -step_size, count=1)
    mirror, mirror_momentum = leapfrogs(start, -momentum, energy, step_size, count=1)
    torch.testing.assert_close(end.position, mirror.position)
    torch.testing.assert_close(end_momentum, -mirror_momentum)


def test_augmented_leapfrog_without_updates_is_the_leapfrog(start: State, energy: Energy) -> None:
    momentum, step_size = torch.randn(4, 3), torch.full((4, 1), 0.3)
    mask = torch.rand(4, 3) < 0.5
    plain, plain_momentum = leapfrogs(start, momentum, energy, SIGNS[:, None] * step_size, count=1)
    end, end_momentum, log_determinant = augmented_leapfrog(
        start, momentum, SIGNS, energy, step_size, mask, no_update, no_update
    )
    torch.testing.assert_close(end.position, plain.position)
    torch.testing.assert_close(end_momentum, plain_momentum)
    assert torch.equal(log_determinant, torch.zeros(4))


def test_augmented_leapfrog_with_the_mask_complemented_goes_back(
    start: State, energy: Energy
) -> None:
    momentum, step_size = torch.randn(4, 3), torch.full((4, 1), 0.3)
    mask = torch.rand(4, 3) < 0.5
    end, end_momentum, there = augmented_leapfrog(
        start, momentum, SIGNS, energy, step_size, mask, random_update, random_update
    )
    back, back_momentum, and_back = augmented_leapfrog(
        end, end_momentum, -SIGNS, energy, step_size, ~mask, random_update, random_update
    )
    assert there.norm() > 1e-2
    torch.testing.assert_close(back.position, start.position)
    torch.testing.assert_close(back_momentum, momentum)
    torch.testing.assert_close(and_back, -there)


def test_position_update_sees_the_fixed_half_only(start: State, energy: Energy) -> None:
    mask = torch.tensor([True, False, True]).expand(4, 3)
    seen: list[Tensor] = []

    def watch(fixed: Tensor, momentum: Tensor) -> Update:
        seen.append(fixed)
        return random_update(fixed, momentum)

    momentum, step_size = torch.randn(4, 3), torch.full((4, 1), 0.3)
    end, *_ = augmented_leapfrog(
        start, momentum, torch.ones(4), energy, step_size, mask, random_update, watch
    )
    first, second = seen
    assert torch.equal(first, torch.where(mask, 0.0, start.position))
    assert torch.equal(second, torch.where(mask, end.position, 0.0))
