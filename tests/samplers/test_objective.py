import pytest
import torch

from samplers import Info, reciprocal_jump_loss, squared_jump

START = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
PROPOSAL = torch.tensor([[3.0, 4.0], [1.0, 1.0]], dtype=torch.float64)


def proposed(proposal: torch.Tensor) -> Info:
    certain = torch.ones(len(proposal))
    return Info(proposal, certain, certain.bool(), ~certain.bool())


def test_squared_jump_by_hand() -> None:
    assert squared_jump(START, proposed(PROPOSAL)).tolist() == [25.0, 1.0]


def test_squared_jump_measured_in_standard_deviations_by_hand() -> None:
    variance = torch.tensor([9.0 - 1e-4, 4.0 - 1e-4])
    expected = torch.tensor([9 / 9 + 16 / 4, 1 / 4])
    torch.testing.assert_close(squared_jump(START, proposed(PROPOSAL), variance), expected)
    per_chain = torch.stack([variance, 4 * variance])
    expected[1] = 1 / (4 * 4.0 - 3e-4)
    torch.testing.assert_close(squared_jump(START, proposed(PROPOSAL), per_chain), expected)


def test_squared_jump_stays_finite_where_a_variance_vanishes() -> None:
    jump = squared_jump(START, proposed(PROPOSAL), torch.zeros(2))
    torch.testing.assert_close(jump, torch.tensor([25e4, 1e4]))


@pytest.mark.parametrize(
    ("jump", "acceptance", "scale", "loss"),
    [
        (1.0, 0.9999, 1.0, 0.0),  # 1/1 - 1/1
        (4.0, 0.5, 1.0, 1 / 2.0001 - 2.0001),
        (4.0, 0.5, 2.0, 4 / 2.0001 - 2.0001 / 4),
        (4.0, 0.0, 1.0, 1e4 - 1e-4),
        (0.0, 1.0, 3.0, 9e4 - 1e-4 / 9),
    ],
)
def test_loss_by_hand(jump: float, acceptance: float, scale: float, loss: float) -> None:
    found = reciprocal_jump_loss(torch.tensor([jump]), torch.tensor([acceptance]), scale)
    torch.testing.assert_close(found, torch.tensor([loss]), rtol=1e-12, atol=1e-12)


def test_larger_and_surer_jumps_have_a_smaller_loss() -> None:
    jump, acceptance = torch.linspace(0, 5, 20), torch.linspace(0, 1, 20)
    assert (reciprocal_jump_loss(jump, torch.tensor(0.7)).diff() < 0).all()
    assert (reciprocal_jump_loss(torch.tensor(2.0), acceptance).diff() < 0).all()


def test_a_longer_scale_asks_for_longer_jumps() -> None:
    jump = torch.tensor([1.0, 1.0, 1.0])
    loss = torch.stack(
        [reciprocal_jump_loss(jump, torch.ones(3), scale)[0] for scale in (0.5, 1, 2)]
    )
    assert (loss.diff() > 0).all()


def test_each_chain_has_its_own_loss() -> None:
    jump, acceptance = torch.rand(5), torch.rand(5)
    alone = torch.cat([reciprocal_jump_loss(jump[[i]], acceptance[[i]]) for i in range(5)])
    torch.testing.assert_close(reciprocal_jump_loss(jump, acceptance), alone)


def test_a_rejected_chain_contributes_a_constant() -> None:
    jump = torch.zeros(2, requires_grad=True)
    acceptance = torch.zeros(2)
    reciprocal_jump_loss(jump, acceptance).sum().backward()
    assert jump.grad is not None
    assert not jump.grad.any()
