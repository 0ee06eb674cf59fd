from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dglm import DGLM, AmortizedPreconditioned, DiagonalGaussian
from dglm.chain import Chain
from samplers import L2HMC, seeded_generator

BuildDGLM = Callable[..., DGLM]

STEPS = 3


def run(module: DGLM, x: Tensor, q: DiagonalGaussian, start: Tensor) -> Chain:
    return module.chain(x, q, start, seeded_generator("cpu", 2), STEPS)


@pytest.mark.parametrize("kind", ["hmc", "l2hmc"])
def test_log_joint_is_that_of_the_start_and_of_each_step(
    build_dglm: BuildDGLM, images: Tensor, kind: str
) -> None:
    module = build_dglm(kind)
    q = module.posterior(images)
    start = q.sample(seeded_generator("cpu", 1))
    chain = run(module, images, q, start)
    assert chain.log_joint.shape == (STEPS + 1, 7)
    for row, z in ((0, start), (-1, chain.state.position)):
        torch.testing.assert_close(chain.log_joint[row], module.model.log_joint(images, z).detach())
    for metric in (chain.log_joint, chain.jump, chain.acceptance, chain.diverging):
        assert not metric.requires_grad


def test_a_chain_that_diverges_stays_and_brings_no_gradient(
    build_dglm: BuildDGLM, images: Tensor
) -> None:
    module = build_dglm("l2hmc")
    assert isinstance(module.kernel, L2HMC)
    q = module.posterior(images)
    start = q.mean.detach().clone()
    start[2] = 1e200
    chain = run(module, images, q, start)
    assert torch.equal(chain.diverging, (torch.arange(7) == 2).double())
    assert torch.equal(chain.state.position[2], start[2])
    parameters = list(module.kernel.parameters())
    found = torch.autograd.grad(chain.loss.sum(), parameters)
    rows = torch.arange(7) != 2
    healthy = torch.autograd.grad(run(module, images, q, start).loss[rows].sum(), parameters)
    torch.testing.assert_close(found, healthy)


def test_a_kernel_in_coordinates_learns_from_siblings_and_leaves_the_coordinates_alone(
    build_dglm: BuildDGLM, images: Tensor
) -> None:
    module = build_dglm("l2hmc in coordinates")
    assert isinstance(module.kernel, AmortizedPreconditioned)
    q = module.posterior(images)
    chain = run(module, images, q, q.mean)
    assert not chain.state.position.requires_grad
    learned, fixed = (
        list(module.kernel.kernel.parameters()),
        list(module.kernel.network.parameters()),
    )
    found = torch.autograd.grad(chain.loss.mean(), learned + fixed, allow_unused=True)
    assert all(gradient.abs().max() > 0 for gradient in found[: len(learned)])
    assert found[len(learned) :] == (None,) * len(fixed)
    others = torch.autograd.grad(chain.coordinate_loss.mean(), learned + fixed, allow_unused=True)
    assert others[: len(learned)] == (None,) * len(learned)
