"""What people ask a trained model for: posterior samples and reconstructions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dglm import DGLM
from samplers import seeded_generator

BuildDGLM = Callable[..., DGLM]


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


@pytest.mark.parametrize("kind", ["vae", "hmc", "l2hmc"])
def test_draws_of_the_encoder_come_first_and_reconstructions_are_means_of_samples(
    build_dglm: BuildDGLM, images: Tensor, kind: str
) -> None:
    module = build_dglm(kind)
    mean, log_std = module.encoder(images)
    noise = torch.randn(7, 3, generator=seeded_generator("cpu", 1))
    first = (mean + log_std.exp() * noise).detach()
    for steps in (None, 0, 2):
        z = module.posterior_samples(images, steps, seeded_generator("cpu", 1))
        assert torch.allclose(z, first) == (kind == "vae" or steps == 0)
        found = module.reconstruct(images, steps, seeded_generator("cpu", 1))
        assert not found.requires_grad
        torch.testing.assert_close(found, torch.sigmoid(module.model.decoder(z)).detach())
