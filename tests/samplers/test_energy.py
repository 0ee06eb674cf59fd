import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from samplers import Energy, EnergyWithGradient, State, value_and_gradient
from samplers.energy import Smoothed, Tempered, finite_gradient

PRECISION = torch.tensor([[2.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)


def quadratic(position: Tensor) -> Tensor:
    return 0.5 * (position @ PRECISION * position).sum(dim=-1)


class Decoder(nn.Module):
    """An energy with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, position: Tensor) -> Tensor:
        return (position @ self.weight).square().sum(dim=-1)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_value_and_gradient_are_those_of_the_energy(requires_grad: bool) -> None:
    position = torch.randn(4, 2, requires_grad=requires_grad)
    state = value_and_gradient(quadratic, position)
    assert state.position is position
    torch.testing.assert_close(state.energy, quadratic(position))
    torch.testing.assert_close(state.gradient, position @ PRECISION)
    assert state.extra == ()
    if requires_grad:
        (hessian_row,) = torch.autograd.grad(state.gradient[:, 0].sum(), position)
        torch.testing.assert_close(hessian_row, PRECISION[0].expand(4, 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluates_where_gradients_are_off(mode: type) -> None:
    position, decoder = torch.randn(4, 2, requires_grad=True), Decoder()
    with mode():
        made_here = PRECISION.clone()
        state = value_and_gradient(lambda z: 0.5 * (z @ made_here * z).sum(dim=-1), position)
        parametrised = value_and_gradient(decoder, position)
    fixed = value_and_gradient(decoder, position.detach())
    detached = (*state[1:3], *parametrised[1:3], *fixed[:3])
    assert not any(field.requires_grad for field in detached)
    torch.testing.assert_close(state.energy, quadratic(position).detach(), check_stride=False)
    torch.testing.assert_close(state.gradient, position.detach() @ PRECISION, check_stride=False)


@pytest.mark.parametrize(
    ("energy", "shape"),
    [
        (lambda z: z.square().sum(), "()"),
        (lambda z: z.square().sum(dim=-1, keepdim=True), "(4, 1)"),
        (lambda z: z.square(), "(4, 2)"),
        (lambda z: z.square().sum(dim=0), "(2,)"),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_energy_of_a_wrong_shape_is_named(energy: Energy, shape: str, inference: bool) -> None:
    message = f"positions (4, 2) to one number a row, (4,), but it returned {shape}"
    with torch.inference_mode(inference), pytest.raises(ValueError, match=re.escape(message)):
        value_and_gradient(energy, torch.randn(4, 2))


def test_energy_with_its_own_gradient_is_taken_at_its_word() -> None:
    class WithGradient:
        def value_and_gradient(self, position: Tensor) -> State:
            return State(position, quadratic(position), position + 7.0, (position[:, 0],))

    position = torch.randn(4, 2)
    state = value_and_gradient(WithGradient(), position)
    assert isinstance(WithGradient(), EnergyWithGradient)
    assert not isinstance(Decoder(), EnergyWithGradient)
    assert torch.equal(state.gradient, position + 7.0)
    assert torch.equal(state.extra[0], position[:, 0])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: State(x, x.square().sum(), x), r"shapes \(4,\) and \(4, 2\) .* got \(\) and"),
        (lambda x: State(x, x.sum(dim=1, keepdim=True), x), r"got \(4, 1\) and \(4, 2\)$"),
        (lambda x: State(x, x.sum(dim=1), x[:1]), r"got \(4,\) and \(1, 2\)$"),
        (lambda x: (x.sum(dim=1), x), "returns a State.*, got tuple$"),
    ],
)
def test_a_gradient_of_its_own_has_the_shapes_of_the_chains(
    answer: Callable[[Tensor], State], message: str
) -> None:
    class WithGradient:
        def value_and_gradient(self, position: Tensor) -> State:
            return answer(position)

    with pytest.raises((TypeError, ValueError), match=message):
        value_and_gradient(WithGradient(), torch.randn(4, 2))


def test_finite_gradient_is_the_identity_with_a_gated_gradient() -> None:
    tensor = torch.randn(4, requires_grad=True)
    gated = finite_gradient(tensor)
    assert torch.equal(gated, tensor)
    incoming = torch.tensor([1.5, torch.nan, torch.inf, -torch.inf])
    (found,) = torch.autograd.grad(gated, tensor, incoming)
    assert found.tolist() == [1.5, 0.0, 0.0, 0.0]
    assert torch.autograd.gradgradcheck(lambda x: finite_gradient(x).pow(3), tensor)


@pytest.mark.parametrize("temperature", [torch.tensor(3.0), torch.tensor([1.0, 2.0, 4.0, 0.5])])
def test_a_tempered_energy_is_divided_by_its_temperature_or_those_of_its_rows(
    temperature: Tensor,
) -> None:
    class WithExtra:
        def value_and_gradient(self, position: Tensor) -> State:
            return value_and_gradient(quadratic, position)._replace(extra=(position[:, 0],))

    position = torch.randn(4, 2)
    state = Tempered(WithExtra(), temperature.double()).value_and_gradient(position)
    expected = value_and_gradient(lambda z: quadratic(z) / temperature, position)
    torch.testing.assert_close(state[:3], expected[:3])
    assert torch.equal(state.extra[0], position[:, 0])


def test_no_sampler_is_trained_on_an_energy_without_a_gradient() -> None:
    class Detached:
        def value_and_gradient(self, position: Tensor) -> State:
            with torch.no_grad():
                return State(position, position.square().sum(dim=-1), 2 * position)

    position = torch.randn(4, 3)
    assert value_and_gradient(Detached(), position).gradient.shape == (4, 3)
    with pytest.raises(ValueError, match="from which no sampler can be trained: compute it"):
        value_and_gradient(Detached(), position.requires_grad_())
    with torch.no_grad():
        value_and_gradient(Detached(), position)


def test_smoothed_curvature_is_that_of_a_difference_and_the_rest_is_exact() -> None:
    def energy(position: Tensor) -> Tensor:  # a ripple whose curvature is 100 times the bowl's
        return (0.5 * position.square() + 0.01 * torch.cos(position / 0.01)).sum(dim=-1)

    position, weight = torch.randn(2, 5, 3)
    smoothed = Smoothed(energy, 0.2)
    exact = value_and_gradient(energy, position)
    for each in (position, position.clone().requires_grad_()):
        state = value_and_gradient(smoothed, each)
        torch.testing.assert_close(state.energy.detach(), exact.energy)
        torch.testing.assert_close(state.gradient.detach(), exact.gradient)
    leaf = position.clone().requires_grad_()
    state = value_and_gradient(smoothed, leaf)
    (found,) = torch.autograd.grad(state.energy.sum() + (weight * state.gradient).sum(), leaf)
    size = weight.norm(dim=-1, keepdim=True)
    ahead, behind = (
        value_and_gradient(energy, position + sign * 0.2 * weight / size).gradient
        for sign in (1, -1)
    )
    torch.testing.assert_close(found, exact.gradient + size * (ahead - behind) / 0.4)
    # sin differs by 2 at most: the ripple's curvature of 100 counts as 5.
    assert ((found - exact.gradient - weight).abs() <= size / 0.2).all()


DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "factorisation": lambda z: (
        torch.linalg.cholesky((1 - z[:, :1, None]) * torch.eye(2)).diagonal(dim1=1, dim2=2).sum(1)
        + z.square().sum(dim=1)
    ),
    "distribution's check": lambda z: (
        -Normal(0.0, 1 - z[:, 0], validate_args=True).log_prob(z[:, 1])
    ),
}


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("outside", [[2], [0, 1], [0, 3, 4], [0, 1, 2, 3, 4]])
def test_rows_at_which_an_energy_raises_are_not_finite_and_the_others_as_alone(
    domain: str, differentiable: bool, outside: list[int]
) -> None:
    energy, rows = DOMAINS[domain], torch.isin(torch.arange(5), torch.tensor(outside))
    position = torch.randn(5, 2).clamp(max=0.9)
    position[rows, 0] = 1.5
    position.requires_grad_(differentiable)
    state = value_and_gradient(energy, position)
    assert state.position is position
    assert state.energy[rows].isnan().all()
    assert state.gradient[rows].isnan().all()
    alone = value_and_gradient(energy, position[~rows]) if not rows.all() else state
    torch.testing.assert_close(state.energy[~rows], alone.energy[: int((~rows).sum())])
    torch.testing.assert_close(state.gradient[~rows], alone.gradient[: int((~rows).sum())])


def test_an_energy_that_knows_something_of_each_row_may_raise_at_some() -> None:
    known = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def energy(z: Tensor) -> Tensor:
        factor = torch.linalg.cholesky((3 - z[:, 0])[:, None, None])
        return known * factor[:, 0, 0] + z.square().sum(dim=1)

    position = torch.tensor([[0.5, 0.0], [3.5, 1.0], [2.9, 0.0], [5.0, 1.0]])
    found = value_and_gradient(energy, position).energy
    expected = known * (3 - position[:, 0]).sqrt() + position.square().sum(dim=1)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda z: z @ torch.ones(7),  # a shape
        lambda z: z.squares(),  # a name
        lambda z: Normal(torch.zeros(3), 1.0, validate_args=True).log_prob(z).sum(1),
        lambda z: [each for each, _, _ in z],  # a ValueError of Python
    ],
)
def test_a_programming_error_is_never_hidden(mistake: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((RuntimeError, AttributeError, ValueError, TypeError)) as found:
        value_and_gradient(mistake, torch.randn(4, 2))
    with pytest.raises(type(found.value)):
        mistake(torch.randn(4, 2))


@pytest.mark.parametrize(
    "energy",
    [
        lambda z: z.detach().square().sum(dim=1),
        lambda z: torch.as_tensor(z.detach().numpy() ** 2).sum(dim=1),
        lambda z: torch.zeros(len(z)),
    ],
)
def test_an_energy_cut_off_from_its_position_is_told_of(energy: Energy) -> None:
    with pytest.raises(ValueError, match="does not depend on the position") as error:
        value_and_gradient(energy, torch.randn(4, 2))
    assert "\n" not in str(error.value)
