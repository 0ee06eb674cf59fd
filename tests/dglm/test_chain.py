from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dglm import DGLM, DiagonalGaussian
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


def test_the_first_rows_train_the_kernel_and_the_others_follow_it(
    build_dglm: BuildDGLM, images: Tensor
) -> None:
    whole, module = build_dglm("l2hmc"), build_dglm("l2hmc", sampler_share=0.4)
    q = whole.posterior(images)
    start = q.mean.detach() + 0.1
    chain, generator = run(module, images, q, start), seeded_generator("cpu", 2)
    for rows in (slice(3), slice(3, None)):
        own = DiagonalGaussian(q.mean[rows], q.log_std[rows])
        alone = whole.chain(images[rows], own, start[rows], generator, STEPS)
        torch.testing.assert_close(chain.state.position[rows], alone.state.position)
        torch.testing.assert_close(chain.acceptance[rows], alone.acceptance)
        if rows.start is None:
            torch.testing.assert_close(chain.loss, alone.loss)
            chain.loss.sum().backward()
            alone.loss.sum().backward()
    pairs = zip(module.kernel.parameters(), whole.kernel.parameters(), strict=True)  # type: ignore[union-attr]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad)
