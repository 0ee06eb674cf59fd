"""What only L2HMC does; what every kernel does is in test_kernel."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from samplers import (
    HMC,
    L2HMC,
    Energy,
    Info,
    Kernel,
    Noise,
    reciprocal_jump_loss,
    seeded_generator,
    value_and_gradient,
)
from samplers.l2hmc import Update, UpdateNetwork
from samplers.objective import squared_jump

BuildL2HMC = Callable[..., L2HMC]
MIXED = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize(("dim", "num_leapfrogs"), [(1, 1), (5, 4)])
def test_without_heads_is_hmc(
    random_l2hmc: BuildL2HMC, energy: Energy, dim: int, num_leapfrogs: int
) -> None:
    kernel = random_l2hmc(dim, num_leapfrogs)
    for network in (kernel.position_network, kernel.momentum_network):
        nn.init.zeros_(network.heads.weight)
        nn.init.zeros_(network.heads.bias)
    hmc = HMC(num_leapfrogs, step_size=0.4)
    position, momentum = torch.randn(2, 4, dim).unbind()
    found = kernel.trajectory(position, momentum, MIXED, energy)
    torch.testing.assert_close(found, hmc.trajectory(position, momentum, MIXED, energy))


def forward_leapfrog(
    kernel: L2HMC, energy: Energy, x: Tensor, v: Tensor, t: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One leapfrog with d = 1, literally as Section 4 of the paper prints it."""
    eps, m = kernel.step_size, kernel.mask[t].double()
    angle = torch.tensor(2 * math.pi * t / kernel.num_leapfrogs)
    tau = torch.stack([angle.cos(), angle.sin()]).expand(len(x), 2)

    def network(which: UpdateNetwork, a: Tensor, b: Tensor) -> Update:
        return which(a, b, tau, None)

    def gradient(x: Tensor) -> Tensor:
        return value_and_gradient(energy, x).gradient

    s1, t1, q1 = network(kernel.momentum_network, x, gradient(x))
    v = v * (eps / 2 * s1).exp() - eps / 2 * (gradient(x) * (eps * q1).exp() + t1)
    s2, t2, q2 = network(kernel.position_network, (1 - m) * x, v)
    x = (1 - m) * x + m * (x * (eps * s2).exp() + eps * (v * (eps * q2).exp() + t2))
    s3, t3, q3 = network(kernel.position_network, m * x, v)
    x = m * x + (1 - m) * (x * (eps * s3).exp() + eps * (v * (eps * q3).exp() + t3))
    s4, t4, q4 = network(kernel.momentum_network, x, gradient(x))
    v = v * (eps / 2 * s4).exp() - eps / 2 * (gradient(x) * (eps * q4).exp() + t4)
    log_determinant = eps / 2 * (s1 + s4) + eps * (m * s2 + (1 - m) * s3)
    return x, v, log_determinant.sum(dim=-1)


@torch.no_grad()
def test_forward_trajectory_is_the_paper_s(random_l2hmc: BuildL2HMC, energy: Energy) -> None:
    kernel = random_l2hmc(5, 3)
    x, v = torch.randn(2, 4, 5).unbind()
    found = kernel.trajectory(x, v, torch.ones(4), energy)
    log_determinant = torch.zeros(4)
    for t in range(3):
        x, v, change = forward_leapfrog(kernel, energy, x, v, t)
        log_determinant = log_determinant + change
    torch.testing.assert_close(found, (x, v, log_determinant))


@pytest.mark.parametrize("dim", [1, 2, 5, 6])
def test_masks_are_halves_that_change_from_leapfrog_to_leapfrog(dim: int) -> None:
    mask = L2HMC(dim, num_leapfrogs=500).mask
    assert mask.shape == (500, dim)
    assert mask.dtype == torch.bool
    assert (mask.sum(dim=-1) == dim // 2).all()
    assert len(mask.unique(dim=0)) == math.comb(dim, dim // 2)


def test_step_size_is_trained_and_masks_are_named_so() -> None:
    kernel, hmc = L2HMC(2, step_size=0.3), HMC(5, 0.3)
    assert [key for key in kernel.state_dict() if "mask" in key] == ["mask"]
    assert kernel.log_step_size.requires_grad
    assert not list(hmc.parameters())
    for each in (kernel, hmc):
        assert each.step_size.item() == pytest.approx(0.3, rel=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("silent", ["position_network", "momentum_network"])
def test_both_networks_see_the_context(
    random_l2hmc: BuildL2HMC, energy: Energy, silent: str
) -> None:
    kernel = random_l2hmc(3, observation_dim=2, embedding_hidden=(4,))
    for parameter in kernel.get_submodule(silent).heads.parameters():  # type: ignore[union-attr]
        parameter.zero_()
    position, momentum, forward = torch.randn(4, 3), torch.randn(4, 3), torch.ones(4)
    ends = [
        kernel.trajectory(position, momentum, forward, energy, kernel.embed(observations))[0]
        for observations in torch.randn(2, 4, 2)
    ]
    assert (ends[0] != ends[1]).all()


def step(kernel: L2HMC, dim: int = 3, context: Tensor | None = None) -> object:
    def energy(position: Tensor) -> Tensor:
        return position.square().sum(dim=-1)

    state = kernel.init(torch.zeros(4, dim), energy)
    return kernel.step(state, energy, kernel.noise(state), context)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda: step(L2HMC(3, observation_dim=2)), r"has an embedding: pass context=kernel\.emb"),
        (lambda: step(L2HMC(3), context=torch.zeros(4, 100)), "takes no context"),
        (lambda: step(L2HMC(3), dim=2), "this kernel is of 3 dimensions, the chains of 2"),
        (lambda: L2HMC(0), "dim and hidden must be at least 1, got 0 and 100"),
        (lambda: L2HMC(2, hidden=0), "dim and hidden must be at least 1, got 2 and 0"),
        (lambda: L2HMC(2, embedding_hidden=(3, 0)), r"embedding_hidden .* 1, got \[3, 0\]"),
    ],
)
def test_what_does_not_fit_is_refused(misuse: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        misuse()


class Training(NamedTuple):
    """The loss of some Metropolis-Hastings steps in a row, as a function of the kernel."""

    kernel: L2HMC
    energy: Energy
    start: Tensor
    noise: list[Noise]
    observations: Tensor

    def run(self, energy: Energy | None = None) -> tuple[Tensor, list[Info]]:
        """Return the losses (J, B) and what each step tells."""
        energy = energy or self.energy
        context = self.kernel.embed(self.observations)
        state, losses, infos = self.kernel.init(self.start, energy), [], []
        for noise in self.noise:
            end, info = self.kernel.step(state, energy, noise, context)
            jump = squared_jump(state.position, info)
            losses.append(reciprocal_jump_loss(jump, info.acceptance))
            infos.append(info)
            state = end
        return torch.stack(losses), infos

    def gradients(
        self, energy: Energy | None = None, weights: Tensor | float = 1.0
    ) -> list[Tensor]:
        losses, _ = self.run(energy)
        parameters = list(self.kernel.parameters())
        return list(torch.autograd.grad((weights * losses).sum(), parameters))


STEPS, CHAINS, LEAPFROGS = 2, 6, 3


@pytest.fixture
def training(random_l2hmc: BuildL2HMC, energy: Energy) -> Training:
    kernel = random_l2hmc(
        2, LEAPFROGS, hidden=3, step_size=0.1, observation_dim=2, embedding_hidden=(2,)
    )
    start, generator = torch.randn(CHAINS, 2), seeded_generator("cpu", 1)
    state = kernel.init(start, energy)
    noise = [kernel.noise(state, generator) for _ in range(STEPS)]
    # The second step starts from a graph, but where the first proposal of a chain is rejected.
    noise[0] = noise[0]._replace(uniform=torch.tensor([0.0] * (CHAINS - 1) + [1.0]))
    return Training(kernel, energy, start, noise, torch.randn(CHAINS, 2))


def test_gradients_of_the_loss_are_those_of_finite_differences(training: Training) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = training.kernel

        def forward(self) -> Tensor:
            return training.run()[0].sum()

    module = Loss()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), ())

    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True)


LOST = torch.arange(CHAINS) % 3 == 0
FIRST_END, MIDDLE, SECOND_MIDDLE, SECOND_END = 3, 2, 5, 6
"""The energy's calls: 0 at the start, then one for each of three leapfrogs in each of two steps."""


@pytest.mark.parametrize(
    ("fault", "call"),
    [
        (fault, call)
        for fault, calls in {
            "nan gradient": (MIDDLE, FIRST_END, SECOND_MIDDLE, SECOND_END),
            "inf gradient": (MIDDLE, FIRST_END, SECOND_MIDDLE, SECOND_END),
            "cliff": (MIDDLE, FIRST_END, SECOND_MIDDLE, SECOND_END),
            **dict.fromkeys(("nan", "inf", "-inf", "outside", "rise"), (FIRST_END, SECOND_END)),
        }.items()
        for call in calls
    ],
)
def test_lost_chains_contribute_a_constant_to_loss_and_gradients(
    training: Training, plant: Callable[..., Energy], fault: str, call: int
) -> None:
    step = (call - 1) // LEAPFROGS
    losses, infos = training.run(plant(training.energy, fault, LOST, call))
    assert torch.equal(infos[step].diverging, LOST)
    assert losses.isfinite().all()
    torch.testing.assert_close(losses[step, LOST], torch.tensor(1e4 - 1e-4).expand(2))

    # After the fault the lost chains go on from elsewhere than without it, so leave that out.
    counted, healthy = torch.ones(2, STEPS, CHAINS)
    counted[step + 1 :, LOST] = 0.0
    healthy[step:, LOST] = 0.0
    found = training.gradients(plant(training.energy, fault, LOST, call), counted)
    assert all(gradient.isfinite().all() for gradient in found)
    torch.testing.assert_close(found, training.gradients(weights=healthy), rtol=1e-9, atol=1e-9)


def test_lost_chains_go_on_with_finite_gradients(
    training: Training, plant: Callable[..., Energy]
) -> None:
    losses, infos = training.run(plant(training.energy, "nan gradient", LOST, MIDDLE))
    assert torch.equal(infos[0].diverging, LOST)
    assert not infos[1].diverging.any()
    gradients = torch.autograd.grad(losses[1, LOST].sum(), list(training.kernel.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hmc", "l2hmc", "compiled l2hmc"])
@pytest.mark.parametrize("networks", [torch.float32, torch.float64])
def test_chains_keep_their_precision_whatever_the_networks(
    random_l2hmc: BuildL2HMC,
    energy: Energy,
    kind: str,
    networks: torch.dtype,
    request: pytest.FixtureRequest,
) -> None:
    chains = {torch.float32: torch.float64, torch.float64: torch.float32}[networks]
    kernel: Kernel = HMC(3) if kind == "hmc" else random_l2hmc(3, step_size=0.1)
    kernel.to(networks)
    if "compiled" in kind:
        kernel.compile(backend=request.getfixturevalue("compiler"))
    position = torch.randn(5, 3).to(chains)
    state = kernel.init(position, energy)
    noise = kernel.noise(state)
    after, info = kernel.step(state, energy, noise)
    trip = kernel.round_trip(position, energy, noise)
    assert {field.dtype for field in (*after[:3], info.acceptance)} == {chains}
    # Inverse to the precision of the chains: both ways see the same rounded networks.
    assert max(part.abs().max() for part in trip) < 1e4 * torch.finfo(chains).eps


@pytest.fixture
def network() -> UpdateNetwork:
    """A network with the weights of a trained one, not those of its initialisation."""
    network = UpdateNetwork(dim=3, hidden=8, head_scale=1.0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network


@pytest.fixture
def inputs() -> list[Tensor]:
    return [torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 2)]


def test_updates_by_hand(network: UpdateNetwork, inputs: list[Tensor]) -> None:
    context = torch.randn(5, 8)
    hidden = (torch.cat(inputs, dim=-1) @ network.inputs.weight.T + network.inputs.bias) + context
    hidden = hidden.clamp(min=0) @ network.trunk.weight.T + network.trunk.bias
    outputs = hidden.clamp(min=0) @ network.heads.weight.T + network.heads.bias
    amplitude = network.log_amplitude.exp()
    scale, translation, gate = network(*inputs, context)
    torch.testing.assert_close(scale, amplitude[:3] * outputs[:, :3].tanh())
    torch.testing.assert_close(gate, amplitude[3:] * outputs[:, 3:6].tanh())
    torch.testing.assert_close(translation, outputs[:, 6:])


@pytest.mark.parametrize("head_scale", [1e-3, 0.0])
def test_starts_near_hamiltonian_dynamics(inputs: list[Tensor], head_scale: float) -> None:
    for output in UpdateNetwork(dim=3, hidden=8, head_scale=head_scale)(*inputs, None):
        assert output.abs().max() < 1e-2
        assert (output != 0).any() == (head_scale > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fault", ["nan", "inf", "-inf", "largest"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_lost_chain_leaves_no_trace_in_the_gradients_of_the_others(
    network: UpdateNetwork, inputs: list[Tensor], which: int, fault: str, dtype: torch.dtype
) -> None:
    network = network.to(dtype)
    inputs = [tensor.to(dtype) for tensor in inputs]
    broken = [tensor.clone() for tensor in inputs]
    broken[which][0] = torch.finfo(dtype).max if fault == "largest" else float(fault)

    def gradients(inputs: list[Tensor], rows: slice) -> tuple[Tensor, ...]:
        loss = sum(output[rows].square().sum() for output in network(*inputs, None))
        return torch.autograd.grad(loss, list(network.parameters()))

    healthy = gradients([tensor[1:] for tensor in inputs], slice(None))
    torch.testing.assert_close(gradients(broken, slice(1, None)), healthy)


def test_an_embedding_is_a_softplus_network_with_a_linear_end() -> None:
    kernel, x = L2HMC(2, observation_dim=4, embedding_hidden=(6, 5)), torch.randn(3, 4)
    assert kernel.embedding is not None
    first, _, second, _, last = kernel.embedding
    expected = last(softplus(second(softplus(first(x)))))
    torch.testing.assert_close(kernel.embed(x), expected)
