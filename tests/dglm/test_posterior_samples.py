"""What people ask a trained model for: posterior samples and reconstructions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dglm import DGLM
from samplers import seeded_generator

BuildDGLM = Callable[..., DGLM]

KINDS = ["vae", "hmc", "l2hmc"]


def test_a_negative_number_of_steps_is_refused(build_dglm: BuildDGLM, images: Tensor) -> None:
    with pytest.raises(ValueError, match="num_mh_steps must be 0 or more, got -1"):
        build_dglm("hmc").posterior_samples(images, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_samples_are_a_function_of_the_generator(
    build_dglm: BuildDGLM, images: Tensor, kind: str
) -> None:
    module = build_dglm(kind)
    first, again, other = (
        module.posterior_samples(images, generator=seeded_generator("cpu", seed))
        for seed in (1, 1, 2)
    )
    assert first.shape == (7, 3)
    assert not first.requires_grad
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_of_the_kernel_leave_a_draw_of_the_encoder(
    build_dglm: BuildDGLM, images: Tensor, kind: str
) -> None:
    module = build_dglm(kind)
    draw = module.posterior_samples(images, 0, seeded_generator("cpu", 1))
    mean, log_std = module.encoder(images)
    noise = torch.randn(7, 3, generator=seeded_generator("cpu", 1))
    torch.testing.assert_close(draw, (mean + log_std.exp() * noise).detach())


def test_steps_of_the_kernel_lead_from_a_bad_encoder_to_the_posterior(
    build_dglm: BuildDGLM, images: Tensor
) -> None:
    module, x = build_dglm("hmc"), images.repeat(50, 1)
    nn.init.constant_(module.encoder.mean.bias, 4.0)  # type: ignore[union-attr, arg-type]
    few, more, many = (
        module.model.log_joint(x, module.posterior_samples(x, steps, seeded_generator("cpu", 1)))
        for steps in (0, None, 20)
    )
    for worse, better in ((few, more), (more, many)):
        difference = (better - worse).detach()
        assert difference.mean() > 5 * difference.std() / len(x) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_reconstructions_are_the_means_of_posterior_samples(
    build_dglm: BuildDGLM, images: Tensor, kind: str
) -> None:
    module = build_dglm(kind)
    for steps in (None, 0, 2):
        z = module.posterior_samples(images, steps, seeded_generator("cpu", 1))
        found = module.reconstruct(images, steps, seeded_generator("cpu", 1))
        assert not found.requires_grad
        torch.testing.assert_close(found, torch.sigmoid(module.model.decoder(z)).detach())


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_samples_work_in_inference_mode(
    build_dglm: BuildDGLM, images: Tensor, kind: str
) -> None:
    module = build_dglm(kind)
    expected = module.posterior_samples(images, generator=seeded_generator("cpu", 1))
    with torch.inference_mode():
        found = module.posterior_samples(images, generator=seeded_generator("cpu", 1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("ask", [DGLM.posterior_samples, DGLM.reconstruct])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5), r"flat, \(B, 6\), or images of 6 numbers, got \(2, 5\)"),
        (torch.zeros(2, 1, 5), r"flat, \(B, 6\), or images of 6 numbers, got \(2, 1, 5\)"),
        (torch.zeros(0, 6), "the batch is empty"),
        (torch.full((2, 6), torch.nan), "NaN"),
        (torch.full((2, 6), 255.0), "divide images of 0 to 255 by 255"),
    ],
)
def test_impossible_observations_are_refused(
    build_dglm: BuildDGLM, ask: Callable, x: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ask(build_dglm("hmc"), x)
