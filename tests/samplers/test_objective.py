import itertools

import pytest
import torch
from torch import Tensor

from samplers import Info, reciprocal_jump_loss
from samplers.objective import Objective, RunningMeans, jumps, siblings, squared_jump

START = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
PROPOSAL = torch.tensor([[3.0, 4.0], [1.0, 1.0]], dtype=torch.float64)


def proposed(proposal: Tensor, acceptance: Tensor | None = None) -> Info:
    certain = torch.ones(len(proposal)) if acceptance is None else acceptance
    return Info(proposal, certain, certain > 0, certain < 0)


def triple(count: int, dim: int = 3) -> tuple[Tensor, Info, Info]:
    """Return states and two proposals of each, all independent, accepted more or less surely."""
    start, one, other = torch.randn(3, count, dim)
    return start, *(proposed(each, torch.rand(count)) for each in (one, other))


def features(position: Tensor, start: Tensor) -> Tensor:
    w = (position - start.mean(dim=0)) / start.std(dim=0, correction=0)
    return torch.cat([w, w.square()], dim=-1)


@pytest.mark.parametrize("alike", [False, True])
def test_siblings_compare_where_two_chains_are_after_a_step(alike: bool) -> None:
    start, first, second = triple(50)
    if alike:  # then they are closer to each other than to where they began
        second = second._replace(proposal=first.proposal + 0.1 * second.proposal)
    f = features(start, start)
    apart, jump = torch.zeros(2, *f.shape)
    for accepted in itertools.product((False, True), repeat=2):
        probability, ends = torch.ones(50), []
        for info, moves in zip((first, second), accepted, strict=True):
            probability = probability * (info.acceptance if moves else 1 - info.acceptance)
            ends.append(features(info.proposal if moves else start, start))
        apart += probability[:, None] * (ends[0] - ends[1]).square()
        jump += probability[:, None] * sum(0.5 * (end - f).square() for end in ends)
    shares = torch.stack([apart.mean(dim=0), jump.mean(dim=0)]) / (2 * f.var(dim=0))
    assert (shares[0] < shares[1]).any() == alike
    expected = shares.amin(dim=0).mean()
    assert siblings(start, first, second, RunningMeans()).score == pytest.approx(expected.item())


def test_the_worst_feature_leads() -> None:
    start, first, second = triple(100, dim=2)
    first.proposal.requires_grad_()
    running = RunningMeans()
    objective = siblings(start, first, second, running)
    (found,) = torch.autograd.grad(objective.loss, first.proposal)
    level = running.values["smaller"]
    f, f1, f2 = (features(each, start) for each in (start, first.proposal, second.proposal))
    a1, a2 = first.acceptance[:, None], second.acceptance[:, None]
    moved = a1 * (f1 - f).square(), a2 * (f2 - f).square()
    apart = a1 * a2 * (f1 - f2).square() + (1 - a2) * moved[0] + (1 - a1) * moved[1]
    both = torch.stack([apart.mean(dim=0), 0.5 * sum(moved).mean(dim=0)]) / (2 * f.var(dim=0))
    torch.testing.assert_close(both.amin(dim=0), level)
    (expected,) = torch.autograd.grad(-both.amin(dim=0).log().mean(), first.proposal)
    torch.testing.assert_close(found, expected)


def both(kind: str, start: Tensor, first: Info, second: Info, running: RunningMeans) -> Objective:
    if kind == "siblings":
        return siblings(start, first, second, running)
    return jumps(start, first, running)


@pytest.mark.parametrize("kind", ["siblings", "jumps"])
def test_the_loss_does_not_see_shifts_and_scales_of_the_coordinates(kind: str) -> None:
    scale, shift = torch.tensor([1e-2, 1.0, 1e3]), torch.tensor([5.0, -1.0, 0.0])
    plain, mapped = RunningMeans(), RunningMeans()
    for _ in range(3):
        start, first, second = triple(40)
        again = [info._replace(proposal=shift + scale * info.proposal) for info in (first, second)]
        expected = both(kind, start, first, second, plain).loss
        found = both(kind, shift + scale * start, *again, mapped).loss
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_jumps_are_measured_in_their_own_running_moment() -> None:
    running, moments = RunningMeans(), []
    for _ in range(4):
        start, info, _ = triple(60, dim=2)
        centre = running.values.get("centre", start.mean(dim=0))
        f, f1 = (
            torch.cat([y, y.square()], dim=-1) for y in (start - centre, info.proposal - centre)
        )
        weighted = info.acceptance[:, None] * (f1 - f)
        moments.append(weighted.T @ (f1 - f) / 60)
        mean = torch.stack(moments).mean(dim=0)
        mean = mean + 0.01 * mean.diagonal().diag()  # the ridge
        expected = -(weighted @ mean.inverse() * (f1 - f)).sum(dim=-1).mean()
        found = jumps(start, info, running)
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-9)
        assert found.score.item() == pytest.approx(0.5 * mean.logdet().item(), abs=1e-9)


def test_a_running_mean_counts_the_first_batches_alike_and_can_start_again() -> None:
    running, batches = RunningMeans(), torch.rand(60)
    for count, batch in enumerate(batches, start=1):
        mean = running.update("a", batch, 0.05)
        if count <= 20:
            assert mean.item() == pytest.approx(batches[:count].mean().item())
    again = RunningMeans()
    again.load_state_dict(running.state_dict(), batches.device)
    for each in (running, again):
        assert each.update("a", mean + 1, 0.05).item() == pytest.approx(mean.item() + 0.05)
    running.restart()
    assert running.update("a", batches[0], 0.05) == batches[0]


@pytest.mark.parametrize(
    ("variance", "jumps"),
    [
        (None, [25.0, 1.0]),
        (torch.tensor([9.0, 4.0]) - 1e-4, [9 / 9 + 16 / 4, 1 / 4]),
        (torch.tensor([[9.0, 4.0], [36.0, 16.0]]) - 1e-4, [9 / 9 + 16 / 4, 1 / 16]),
        (torch.zeros(2), [25e4, 1e4]),  # it stays finite
    ],
)
def test_squared_jump_by_hand(variance: Tensor | None, jumps: list[float]) -> None:
    found = squared_jump(START, proposed(PROPOSAL), variance)
    torch.testing.assert_close(found, torch.tensor(jumps), check_dtype=False)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_loss_by_hand(scale: float) -> None:
    jump, acceptance = torch.tensor([1.0, 4.0, 4.0, 0.0]), torch.tensor([0.9999, 0.5, 0.0, 1.0])
    share = torch.tensor([1.0, 2.0001, 1e-4, 1e-4]) / scale**2
    found = reciprocal_jump_loss(jump, acceptance, scale)
    torch.testing.assert_close(found, 1 / share - share, rtol=1e-12, atol=1e-12)
