"""Short chains from q, and the long chain that they are compared with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dglm import DGLM, DiagonalGaussian, Gaussian, GenerativeModel
from dglm.chain import Chain, long_chain_log_joint
from dglm.gaussian import gaussian_log_prob
from samplers import HMC, seeded_generator

STEPS = 3
Run = Callable[..., tuple[DGLM, Chain]]


@pytest.fixture
def run(build_dglm: Callable[..., DGLM], images: Tensor) -> Run:
    """A function that runs the kernel of this kind from a start, by default the means of q."""

    def run(kind: str, start: Tensor | None = None) -> tuple[DGLM, Chain]:
        module = build_dglm(kind)
        q: DiagonalGaussian = module.posterior(images)
        start = q.mean if start is None else start
        return module, module.chain(images, q, start, seeded_generator("cpu", 2), STEPS)

    return run


@pytest.mark.parametrize("kind", ["hmc", "l2hmc"])
def test_log_joint_is_that_of_the_start_and_of_each_step(
    run: Run, images: Tensor, kind: str
) -> None:
    start = torch.randn(7, 3)
    module, chain = run(kind, start)
    assert chain.log_joint.shape == (STEPS + 1, 7)
    for row, z in ((0, start), (-1, chain.state.position)):
        torch.testing.assert_close(chain.log_joint[row], module.model.log_joint(images, z).detach())
    for metric in (chain.log_joint, chain.jump, chain.acceptance, chain.diverging):
        assert not metric.requires_grad


def test_a_chain_that_diverges_stays_and_brings_no_gradient(run: Run) -> None:
    start, lost = torch.randn(7, 3), torch.arange(7) == 2
    start[lost] = 1e200
    gradients = []
    for rows in (torch.ones(7).bool(), ~lost):
        module, chain = run("l2hmc", start)
        assert torch.equal(chain.diverging, lost.double())
        assert torch.equal(chain.state.position[lost], start[lost])
        loss = chain.loss[rows].sum()
        gradients.append(torch.autograd.grad(loss, [*module.sampler.parameters()]))
    torch.testing.assert_close(*gradients)


class LearnedNoise(Gaussian):
    """A Gaussian whose standard deviation is trained with the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        scale = self.log_scale.expand_as(x)
        return gaussian_log_prob((x - parameters) / scale.exp(), scale)


@pytest.mark.parametrize("kind", ["hmc in coordinates", "l2hmc", "l2hmc in coordinates"])
def test_no_loss_of_a_chain_reaches_the_likelihood(
    build_dglm: Callable[..., DGLM], images: Tensor, kind: str
) -> None:
    module = build_dglm(kind)
    module.model.likelihood = LearnedNoise()
    learned, q = module.model.likelihood.log_scale, module.posterior(images)
    chain = module.chain(images, q, q.mean, seeded_generator("cpu", 2), STEPS)
    losses = (chain.loss + chain.coordinate_loss).mean() + 0 * learned
    assert torch.autograd.grad(losses, learned)[0] == 0
    log_joint = module.model.log_joint(images, chain.state.position.detach()).mean()
    assert torch.autograd.grad(log_joint, learned)[0].abs() > 1e-3


def test_a_kernel_in_coordinates_learns_from_siblings_and_leaves_the_coordinates_alone(
    run: Run,
) -> None:
    module, chain = run("l2hmc in coordinates")
    assert not chain.state.position.requires_grad
    learned, fixed = list(module.sampler.parameters()), list(module.coordinate_network.parameters())
    found = torch.autograd.grad(chain.loss.mean(), learned + fixed, allow_unused=True)
    assert all(gradient.abs().max() > 0 for gradient in found[: len(learned)])
    assert found[len(learned) :] == (None,) * len(fixed)
    others = torch.autograd.grad(chain.coordinate_loss.mean(), learned + fixed, allow_unused=True)
    assert others[: len(learned)] == (None,) * len(learned)


# The long chain

COPIES = 200
"""Chains of the same image, whose spread gives the standard error of their mean."""


def linear(weight: list[list[float]]) -> nn.Linear:
    decoder = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor(weight))
    return decoder


def test_means_of_a_long_chain_are_those_of_quadrature_for_each_image() -> None:
    model = GenerativeModel(linear([[4.0], [-1.0], [0.5]]), 1)  # with skewed posteriors
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    z = torch.linspace(-10, 10, 4001)[:, None]
    rows, start = x.repeat_interleave(COPIES, dim=0), torch.full((3 * COPIES, 1), 4.0)
    found = long_chain_log_joint(model, rows, start, 200, 4, seeded_generator("cpu", 0))
    for image, means in zip(x, found.view(3, COPIES), strict=True):
        log_joint = model.log_joint(image.expand(4001, -1), z).detach()
        exact, error = (log_joint.softmax(dim=0) * log_joint).sum(), means.std() / COPIES**0.5
        assert (means.mean() - exact).abs() < 5 * error < 0.1


def test_the_step_size_is_frozen_where_draws_count(
    model: GenerativeModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, step = [], HMC.step

    def watched(kernel: HMC, *given: Any) -> Any:
        used.append(float(kernel.step_size))
        return step(kernel, *given)

    monkeypatch.setattr(HMC, "step", watched)
    long_chain_log_joint(model, images, torch.zeros(7, 3), 20)
    assert len(set(used[:10])) == 10
    assert len(set(used[10:])) == 1


def test_a_long_chain_does_not_resonate() -> None:
    # Five leapfrogs are a period of the wide coordinates.
    decoder = linear([[20.0, 0, 0], [0, 12.1, 0], [0, 0, 12.1]])
    model, generator = GenerativeModel(decoder, 3, Gaussian(1.0)), seeded_generator("cpu", 0)
    start = torch.randn(COPIES, 3, generator=generator) / 20
    found = long_chain_log_joint(model, torch.zeros(COPIES, 3), start, 400, 5, generator)
    assert found.std() < 0.3  # 0.19 ± 0.01; undisturbed 0.6 ± 0.04
