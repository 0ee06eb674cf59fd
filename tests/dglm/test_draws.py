"""All that draws or takes images: a function of the seed alone, and of sound images and counts."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dglm import (
    DGLM,
    AISSettings,
    Encoder,
    FittedStart,
    GenerativeModel,
    KernelSteps,
    RefinedStart,
    bidirectional_bounds,
    estimate_log_likelihood,
    importance_weighted_bound,
    inpaint,
)
from dglm.annealing import temperatures
from dglm.chain import long_chain_log_joint
from dglm.likelihoods import Bernoulli, Gaussian
from dglm.starts import starting_points
from samplers import HMC, seeded_generator

pytestmark = [
    pytest.mark.filterwarnings("ignore:the log-likelihoods of"),
    pytest.mark.filterwarnings("ignore:the importance-weighted bounds of"),
]


class Given(NamedTuple):
    """What a draw is made from."""

    model: GenerativeModel
    encoder: Encoder
    build_dglm: Callable[..., DGLM]
    x: Tensor
    seed: int = 0

    @property
    def generator(self) -> torch.Generator:
        return seeded_generator("cpu", self.seed)

    def dglm(self, kind: str) -> DGLM:
        return self.build_dglm(kind)


Draw = Callable[[Given], Tensor]
HIDDEN = torch.arange(6) >= 3


def ais(given: Given, start: Any) -> Tensor:
    settings = AISSettings(4, 5, 2, seed=given.seed)
    starts = {
        "encoder": given.encoder,
        "fit": FittedStart(given.encoder),
        "coordinates": RefinedStart(given.dglm("hmc in coordinates").kernel),
    }
    begin = starts.get(start, start)
    return estimate_log_likelihood(given.model, given.x, settings, begin).log_weights


def bounds(given: Given) -> Tensor:
    found = bidirectional_bounds(given.model, 3, AISSettings(4, 5, 2, seed=given.seed), "prior")
    return torch.stack([found.lower, found.upper])


def filled(given: Given, posterior: Callable[[Given], Any]) -> Tensor:
    generator = given.generator
    return inpaint(given.model, given.x, ~HIDDEN, 3, posterior(given), generator=generator)


def fits(given: Given) -> Tensor:
    start = FittedStart(given.encoder)
    return starting_points(given.model, given.x, start, 2, given.seed).gaussians.mean.detach()


def samples(given: Given, kind: str) -> Tensor:
    return given.dglm(kind).posterior_samples(given.x, generator=given.generator)


def long(given: Given) -> Tensor:
    return long_chain_log_joint(given.model, given.x, torch.zeros(7, 3), 4, 2, given.generator)


STARTS = "prior", "encoder", "coordinates", "fit", "fitted"
OF_NO_IMAGES: dict[str, Draw] = {
    "Bernoulli": lambda given: Bernoulli().sample(given.x - 0.5, given.generator),
    "Gaussian": lambda given: Gaussian().sample(given.x, given.generator),
    "q": lambda given: given.dglm("vae").posterior(given.x).sample(given.generator).detach(),
    "model's z": lambda given: given.model.sample(20, given.generator)[1],
    "model's x": lambda given: given.model.sample(20, given.generator)[0],
    "BDMC": bounds,
    "fits": fits,
    "long chains": long,
}
OF_IMAGES: dict[str, Draw] = {
    **{f"AIS, {start}": partial(ais, start=start) for start in STARTS},
    **{f"samples, {kind}": partial(samples, kind=kind) for kind in ("vae", "hmc", "l2hmc")},
    "reconstruction": lambda g: g.dglm("hmc").reconstruct(g.x, generator=g.generator),
    "inpainting, encoder": partial(filled, posterior=lambda given: given.encoder),
    "inpainting, HMC": partial(filled, posterior=lambda given: KernelSteps(HMC(2, 0.3), 2)),
    "inpainting, L2HMC": partial(filled, posterior=lambda given: (given.dglm("l2hmc").kernel, 1)),
    "importance": lambda given: importance_weighted_bound(
        given.model, given.encoder, given.x, 10, given.seed
    )[0],
}
DRAWS = OF_NO_IMAGES | OF_IMAGES


@pytest.fixture
def given(model: GenerativeModel, build_dglm: Callable[..., DGLM], images: Tensor) -> Given:
    return Given(model, Encoder(6, 3, (4,)), build_dglm, images)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draws_are_a_function_of_the_seed_and_leave_nothing_behind(
    draw: Draw, given: Given
) -> None:
    before = {name: value.clone() for name, value in given.model.state_dict().items()}

    def drawn(seed: int) -> Tensor:
        torch.seed()
        return draw(given._replace(seed=seed))

    first = drawn(1)
    assert torch.equal(first, drawn(1))
    assert not torch.equal(first, drawn(2))
    assert not first.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(drawn(1), first)
    assert all(parameter.grad is None for parameter in given.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())


@pytest.mark.parametrize("draw", OF_IMAGES.values(), ids=OF_IMAGES)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((2, 6), torch.nan), "2 of 2 observations hold NaN"),
        (torch.full((2, 6), 255.0), r"in \[0, 1\].* divide images of 0 to 255 by 255"),
        (torch.zeros(2, 5), r"flat, \(B, 6\), or images of 6 numbers, got \(2, 5\)"),
        (torch.zeros(0, 6), "the batch is empty"),
    ],
)
def test_images_that_cannot_be_the_models_are_refused(
    draw: Draw, x: Tensor, message: str, given: Given
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(given._replace(x=x))


class Full(nn.Module):
    """Coordinates whose factor is a symmetric root, of which the diagonal is no determinant."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :3], (torch.eye(3) + 0.1).expand(len(x), 3, 3)


class Broken(nn.Module):
    """An encoder whose training has failed."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_full((len(x), 3), torch.nan), x.new_zeros(len(x), 3)


@pytest.mark.parametrize("name", ["AIS, encoder", "AIS, fit", "importance"])
@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (Broken, r"q\(z\|x\) is not finite: start at the prior"),
        (lambda: nn.Sequential(nn.Dropout(), Encoder(6, 3, (4,))), r"something else.*encoder\.eva"),
        (lambda: Encoder(6, 2, (4,)), r"of 3 latent .* returns \(3, 2\) and \(3, 2\) for 3 obs"),
        (lambda: nn.Linear(6, 3), r"must return mean and log standard .* returns \(3, 3\) for 3"),
    ],
)
def test_an_encoder_that_is_no_function_is_refused(
    name: str, encoder: Callable[[], Any], message: str, given: Given
) -> None:
    given = given._replace(encoder=encoder(), x=given.x / 2 + 0.25)
    with pytest.raises(ValueError, match=message):
        DRAWS[name](given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: AISSettings(num_chains=0), "num_chains must be at least 1, got 0"),
        (lambda g: AISSettings(num_temperatures=0), "num_temperatures must be at least 1, got 0"),
        (lambda g: AISSettings(num_leapfrogs=-1), "num_leapfrogs must be at least 1, got -1"),
        (lambda g: AISSettings(seed=-1), "seed must be 0 or more, got -1"),
        (lambda g: temperatures(0), "num_temperatures must be at least 1, got 0"),
        (lambda g: ais(g, "posterior"), "start must be .* RefinedStart or an encoder"),
        (lambda g: ais(g, RefinedStart(None)), "no coordinates to start at"),
        (lambda g: ais(g, RefinedStart(g.encoder)), r"L \(3, 3\) of each image, but it returns"),
        (lambda g: ais(g, RefinedStart(Full())), "lower triangular, with a positive diagonal"),
        (lambda g: bidirectional_bounds(g.model, 1), "at least 2 for an error bar, got 1"),
        (lambda g: importance_weighted_bound(g.model, g.encoder, g.x, 1), "at least 2, got 1"),
        (lambda g: long_chain_log_joint(g.model, g.x, g.x, 1), "num_steps must be at least 2, got"),
        (lambda g: g.dglm("hmc").posterior_samples(g.x, -1), "num_mh_steps must be 0 or more, got"),
        (lambda g: g.dglm("vae").chain(g.x, None, None), "a VAE has no kernel"),  # type: ignore[arg-type]
        (lambda g: g.build_dglm("hmc", num_mh_steps=0), "num_mh_steps must be at least 1, got 0"),
        (lambda g: g.build_dglm("hmc", jump_scale=0.0), "jump_scale must be positive, got 0.0"),
        (lambda g: g.build_dglm("hmc", jump_scale=torch.nan), "jump_scale must be .*, got nan"),
        (lambda g: g.build_dglm("hmc in coordinates", jump_scale=2.0), "2.0 would be ignored"),
        (lambda g: g.build_dglm("hmc", decay_share=1.1), "decay_share must lie .*got 1.1"),
        (lambda g: g.build_dglm("hmc", decay_share=torch.nan), "decay_share must lie .*got nan"),
        (lambda g: GenerativeModel(nn.Linear(1, 6), 0), "latent_dim must be at least 1, got 0"),
        (lambda g: Gaussian(0.0), "positive number, got 0.0"),
        (lambda g: Gaussian(torch.inf), "positive number, got inf"),
    ],
)
def test_numbers_out_of_range_are_refused(call: Draw, message: str, given: Given) -> None:
    with pytest.raises(ValueError, match=message):
        call(given)
