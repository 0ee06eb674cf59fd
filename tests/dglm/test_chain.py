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


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_chain_repeats_the_steps_of_its_kernel(
    build_dglm: BuildDGLM, images: Tensor, scale: float
) -> None:
    module = build_dglm("hmc", jump_scale=scale)
    kernel, q = module.kernel, module.posterior(images)
    assert kernel is not None
    energy, generator = module.model.energy(images), seeded_generator("cpu", 2)
    state, jumps, acceptances = kernel.init(q.mean.detach(), energy), [], []
    for _ in range(STEPS):
        origin = state.position
        state, info = kernel.step(state, energy, kernel.noise(state, generator))
        variance = (2 * q.log_std).exp().detach() + 1e-4
        jumps.append(((info.proposal - origin).square() / variance).sum(dim=-1))
        acceptances.append(info.acceptance)
    jump, acceptance = torch.stack(jumps), torch.stack(acceptances)
    chain = run(module, images, q, q.mean)
    torch.testing.assert_close(chain.state, state)
    torch.testing.assert_close(chain.acceptance, acceptance.mean(dim=0))
    torch.testing.assert_close(chain.jump, (jump * acceptance).mean(dim=0))
    moved = jump * acceptance + 1e-4
    expected = (scale**2 / moved - moved / scale**2).sum(dim=0)
    torch.testing.assert_close(chain.loss, expected)
    assert torch.equal(chain.diverging, torch.zeros(7))


def test_the_loss_reaches_the_kernel_alone(build_dglm: BuildDGLM, images: Tensor) -> None:
    module = build_dglm("l2hmc")
    assert module.kernel is not None
    q = module.posterior(images)
    start = q.sample()
    chain = run(module, images, q, start)
    others = [start, *q, *module.encoder.parameters(), *module.model.parameters()]
    loss = chain.loss.sum()
    found = torch.autograd.grad(loss, others, allow_unused=True, retain_graph=True)
    assert found == (None,) * len(others)
    gradients = torch.autograd.grad(loss, list(module.kernel.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_only_the_loss_and_the_state_are_differentiable(
    build_dglm: BuildDGLM, images: Tensor
) -> None:
    module = build_dglm("l2hmc")
    q = module.posterior(images)
    chain = run(module, images, q, q.sample())
    assert chain.loss.requires_grad
    assert chain.state.position.requires_grad
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
