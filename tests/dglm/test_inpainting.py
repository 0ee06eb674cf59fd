from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dglm import Encoder, GenerativeModel, KernelSteps, inpaint
from samplers import HMC, L2HMC, seeded_generator

GIVEN = torch.tensor([True, False, True, True, False, False])
HIDDEN = ~GIVEN


class Prior(nn.Module):
    """An encoder that has learned nothing: q(z|x) = p(z)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_zeros(len(x), 1), x.new_zeros(len(x), 1)


POSTERIORS = {
    "encoder": lambda: Encoder(6, 3, (4,)),
    "hmc": lambda: KernelSteps(HMC(2, 0.3), 2),
    "l2hmc": lambda: (L2HMC(3, 2, 0.3, 4, observation_dim=6, embedding_hidden=(4,)), 1),
}


@pytest.fixture(params=POSTERIORS)
def posterior(request: pytest.FixtureRequest) -> Any:
    return POSTERIORS[request.param]()


@pytest.mark.parametrize("given", [GIVEN, torch.rand(50, 6) < 0.5, torch.ones(6).bool()])
def test_hidden_pixels_change_alone_and_each_sweep_can_be_observed(
    model: GenerativeModel, posterior: Any, given: Tensor
) -> None:
    grey, seen = torch.rand(50, 6), list[tuple[Tensor, Tensor]]()
    frames = inpaint(model, grey, given, 10, posterior, observe=lambda *pair: seen.append(pair))
    assert frames.shape == (10, 50, 6)
    for frame in frames:
        assert torch.equal(frame == grey, given.expand(50, -1))
    hidden = frames[:, ~given.expand(50, -1)]
    assert set(hidden.unique().tolist()) <= {0.0, 1.0}
    assert given.all() or (hidden.diff(dim=0) != 0).any(dim=0).float().mean() > 0.5
    x, z = map(torch.stack, zip(*seen, strict=True))
    assert torch.equal(x, frames)
    assert z.shape == (10, 50, 3)
    assert len(z.unique(dim=0)) == 10


# The distribution of what is filled in


@pytest.fixture
def one_latent() -> GenerativeModel:
    """Six pixels that one latent variable makes agree or disagree."""
    decoder = nn.Linear(1, 6)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[1.5], [2.5], [-1.0], [2.0], [-3.0], [1.0]]))
        decoder.bias.copy_(torch.tensor([0.5, -0.5, 0.0, 1.0, 0.5, -1.0]))
    return GenerativeModel(decoder, 1)


IMAGE = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
PATTERNS = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)


@torch.no_grad()
def quadrature(model: GenerativeModel) -> Tensor:
    """Return the probability of each of the hidden pixels' patterns given the other pixels."""
    z = torch.linspace(-10, 10, 4001)[:, None]
    x = IMAGE.repeat(8, 1)
    x[:, HIDDEN] = PATTERNS
    joint = [model.log_joint(pattern.expand(4001, -1), z).logsumexp(dim=0) for pattern in x]
    return torch.stack(joint).softmax(dim=0)


def deviations(model: GenerativeModel, posterior: Any, seed: int = 0) -> Tensor:
    """Return how many standard errors the frequency of each pattern is off, over many chains."""
    chains, warm_up, sweeps = 1000, 40, 160
    generator = seeded_generator("cpu", seed)
    frames = inpaint(model, IMAGE.repeat(chains, 1), GIVEN, sweeps, posterior, generator=generator)
    index = (frames[warm_up:, :, HIDDEN] @ torch.tensor([4.0, 2.0, 1.0])).long()
    frequency = nn.functional.one_hot(index, 8).double().mean(dim=0)
    error = frequency.std(dim=0) / chains**0.5
    return (frequency.mean(dim=0) - quadrature(model)) / error


# One short trajectory a sweep is far from an independent draw of z.
@pytest.mark.parametrize(
    "build",
    [
        lambda: HMC(1, 0.7),
        lambda: L2HMC(1, 2, 0.5, 4, head_scale=2.0, observation_dim=6, embedding_hidden=(4,)),
    ],
)
def test_patterns_are_as_frequent_as_their_probability(
    one_latent: GenerativeModel, build: Any
) -> None:
    assert quadrature(one_latent).min() > 0.005
    assert (deviations(one_latent, KernelSteps(build(), 1)).abs() < 5).all()


def test_a_wrong_encoder_fills_in_wrong_patterns(one_latent: GenerativeModel) -> None:
    assert deviations(one_latent, Prior()).abs().max() > 20


# What a kernel is given


def test_latent_variables_persist_from_sweep_to_sweep() -> None:
    decoder = nn.Linear(1, 6)
    with torch.no_grad():
        decoder.weight.fill_(1e3)
        decoder.bias.zero_()
    model = GenerativeModel(decoder, 1)
    start = torch.tensor([[-1.0], [1.0], [1.0], [-1.0]])
    # Steps too small to leave the side of zero that decides about all pixels.
    frames = inpaint(model, torch.zeros(4, 6), GIVEN, 8, (HMC(1, 1e-6), 1), start=start)
    assert torch.equal(frames[..., HIDDEN], (start > 0).double().expand(8, 4, 3))


def test_without_a_start_chains_begin_at_the_prior(one_latent: GenerativeModel) -> None:
    x, still = torch.zeros(20_000, 6), (HMC(1, 1e-6), 1)
    (frame,) = inpaint(one_latent, x, torch.zeros(6).bool(), 1, still)
    z = torch.linspace(-10, 10, 4001)[:, None]
    density = (-z.square() / 2).softmax(dim=0)
    expected = (density * torch.sigmoid(one_latent.decoder(z).detach())).sum(dim=0)
    error = (expected * (1 - expected) / len(x)).sqrt()
    assert ((frame.mean(dim=0) - expected).abs() < 5 * error).all()


def test_the_kernel_and_the_encoder_see_the_image_of_the_last_sweep(
    model: GenerativeModel,
) -> None:
    kernel = L2HMC(3, 2, 0.3, 4, observation_dim=6, embedding_hidden=(4,))
    encoder, seen = Encoder(6, 3, (4,)), []
    assert kernel.embedding is not None
    for module in (kernel.embedding, encoder):
        module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    grey = torch.rand(20, 6)
    for posterior in ((kernel, 2), encoder):
        frames = inpaint(model, grey, GIVEN, 3, posterior)
        assert torch.equal(torch.stack(seen), torch.stack([grey, *frames[:-1]]))
        seen.clear()


def test_the_steps_of_the_kernel_are_taken_in_each_sweep(
    model: GenerativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, step = [], HMC.step

    def counting(*arguments: Any) -> tuple:
        steps.append(1)
        return step(*arguments)

    monkeypatch.setattr(HMC, "step", counting)
    inpaint(model, torch.zeros(2, 6), GIVEN, 3, KernelSteps(HMC(), 4))
    assert len(steps) == 12


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"given": GIVEN.double()}, "mask of given pixels must be boolean, got torch.float64"),
        ({"given": GIVEN[:5]}, r"must have shape \(6,\) or \(2, 6\), got \(5,\)"),
        ({"given": GIVEN.expand(3, 6)}, r"must have shape \(6,\) or \(2, 6\), got \(3, 6\)"),
        ({"sweeps": 0}, "sweeps must be at least 1, got 0"),
        ({"posterior": HMC()}, r"pass posterior=\(kernel, steps a sweep\)"),
        ({"posterior": (HMC(), 0)}, "at least 1 step a sweep, got 0"),
        ({"posterior": (HMC(), 1), "start": torch.zeros(1, 3)}, r"\(2, 3\), got \(1, 3\)"),
    ],
)
def test_impossible_settings_are_refused(
    model: GenerativeModel, changes: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = {"images": torch.zeros(2, 6), "given": GIVEN, "sweeps": 2}
    with pytest.raises(ValueError, match=message):
        inpaint(model, **{**settings, "posterior": KernelSteps(HMC(), 1), **changes})
