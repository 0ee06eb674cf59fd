"""What a training step of every kind computes, by hand."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, MultivariateNormal, Normal

from dglm import DGLM
from dglm.chain import TRAINED_EVERY
from dglm.coordinates import sibling_loss
from dglm.module import ACCEPTANCE
from samplers import HMC, State, seeded_generator

BuildDGLM = Callable[..., DGLM]
MakeTrainer = Callable[..., Trainer]

KINDS = ["vae", "hmc", "l2hmc", "hmc in coordinates", "l2hmc in coordinates"]


class ByHand:
    """U(z) = -log p(x, z) from torch.distributions and a copy of the decoder."""

    def __init__(self, decoder: nn.Module, x: Tensor) -> None:
        self.decoder, self.x = deepcopy(decoder).requires_grad_(False), x

    def __call__(self, z: Tensor) -> Tensor:
        return -log_joint(self.decoder, self.x, z)

    def value_and_gradient(self, position: Tensor) -> State:
        with torch.enable_grad():
            leaf = position if position.requires_grad else position.detach().requires_grad_()
            energy = self(leaf)
            (gradient,) = torch.autograd.grad(energy.sum(), leaf, create_graph=True)
        return State(position, energy, gradient)


def log_joint(decoder: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    prior = Normal(0.0, 1.0).log_prob(z).sum(dim=-1)
    return prior + Bernoulli(logits=decoder(z)).log_prob(x).sum(dim=-1)


class Step(NamedTuple):
    """The parts of one training step, each (B,)."""

    elbo: Tensor
    log_joint: Tensor
    sampler_loss: Tensor
    jump: Tensor
    acceptance: Tensor
    coordinate_loss: Tensor

    def losses(self, module: DGLM) -> list[tuple[Tensor, nn.Module]]:
        """Return which loss trains which part of a module."""
        if module.kernel is None:
            return [(-self.elbo, module.encoder), (-self.elbo, module.model)]
        pairs = [(-self.elbo, module.encoder), (-self.log_joint, module.model)]
        others = (
            (self.sampler_loss, module.sampler),
            (self.coordinate_loss, module.coordinate_network),
        )
        return pairs + [(loss, part) for loss, part in others if part and [*part.parameters()]]


def by_hand(module: DGLM, x: Tensor) -> Step:
    """Repeat the module's next training step."""
    decoder = module.model.decoder
    generator = seeded_generator("cpu", module.seed, "training", module.global_step, 0)
    mean, log_std = module.encoder(x)
    z = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
    entropy = Normal(mean, log_std.exp()).entropy().sum(dim=-1)
    if module.kernel is None:
        elbo = log_joint(decoder, x, z) + entropy
        return Step(elbo, *5 * [torch.zeros_like(elbo)])
    energy, losses, jumps, acceptances = ByHand(decoder, x), [], [], []
    context, state = module.kernel.embed(x), energy.value_and_gradient(z.detach())
    posterior: Distribution = Independent(Normal(mean, log_std.exp()), 1)
    if module.coordinate_network is not None:
        mean, factor = module.kernel(x)
        posterior = MultivariateNormal(mean, scale_tril=factor)
    variance = posterior.variance.detach()
    for _ in range(module.num_mh_steps):
        noise, origin = module.kernel.noise(state, generator), state.position
        state, info = module.kernel.step(state, energy, noise, context)
        distance = ((info.proposal - origin).square() / (variance + 1e-4)).sum(dim=-1)
        jump = distance * info.acceptance + 1e-4
        losses.append(module.jump_scale**2 / jump - jump / module.jump_scale**2)
        jumps.append(distance * info.acceptance)
        acceptances.append(info.acceptance)
    sampler_loss = torch.stack(losses).sum(dim=0)
    if module.coordinate_network is not None and [*module.sampler.parameters()]:
        ends = z.detach(), state.position.detach()
        sampler_loss = of_siblings(module, x, ends, generator)
    return Step(
        entropy - energy(z),
        log_joint(decoder, x, state.position.detach()),
        sampler_loss,
        torch.stack(jumps).mean(dim=0),
        torch.stack(acceptances).mean(dim=0),
        score_difference(posterior, state).div(3).log1p().mul(1.5)
        if isinstance(posterior, MultivariateNormal)
        else torch.zeros(len(x)),
    )


def of_siblings(
    module: DGLM, x: Tensor, ends: tuple[Tensor, Tensor], generator: torch.Generator
) -> Tensor:
    """Return the loss of two steps from the first quarter of the chains, begun or ended."""
    count = math.ceil(len(x) / 4)
    begun, ended = ends
    z = torch.cat([begun[: count // 2], ended[count // 2 : count]])
    twins, start = x[:count].repeat(2, 1), z.repeat(2, 1)
    energy, context = ByHand(module.model.decoder, twins), module.kernel.embed(twins)
    state = energy.value_and_gradient(start)
    noise = module.kernel.noise(state, generator)
    _, info = module.kernel.step(state, energy, noise, context)
    return sibling_loss(context.gaussian, start, info)


def score_difference(gaussian: MultivariateNormal, state: State) -> Tensor:
    """Return the squared distance of two scores, in the coordinates of the Gaussian."""
    z = state.position.detach().requires_grad_()
    (score,) = torch.autograd.grad(gaussian.log_prob(z).sum(), z, create_graph=True)
    difference = state.gradient.detach() + score
    return (difference[:, None] @ gaussian.scale_tril).square().sum(dim=(1, 2))


class Attached(NamedTuple):
    """A module in training, the metrics that it logs and its images."""

    module: DGLM
    metrics: dict[str, float]
    x: Tensor

    def loss(self, batch_index: int = 0) -> Tensor:
        return self.module.training_step(self.x, batch_index)


Attach = Callable[..., Attached]


@pytest.fixture
def attach(
    build_dglm: BuildDGLM,
    images: Tensor,
    make_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> Attach:
    """A builder of modules that are ready for a training step outside of ``Trainer.fit``."""
    trainer, metrics = make_trainer(), {}

    def log(self: DGLM, name: str, value: Tensor, **options: object) -> None:
        metrics[name] = float(value)

    monkeypatch.setattr(DGLM, "log", log)

    def build(kind: str, **options: Any) -> Attached:
        module = build_dglm(kind, **options)
        module.trainer = trainer
        return Attached(module, metrics, images)

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_descends_its_own_loss_alone_and_metrics_are_those_by_hand(
    attach: Attach, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DGLM, "global_step", TRAINED_EVERY - 1)
    attached = attach(kind, jump_scale=1.0 if "coordinates" in kind else 1.5)
    module, expected, loss = attached.module, by_hand(attached.module, attached.x), attached.loss()
    trained: list[nn.Parameter] = []
    for part_loss, part in expected.losses(module):
        parameters = list(part.parameters())
        by_parts = torch.autograd.grad(part_loss.mean(), parameters, retain_graph=True)
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        torch.testing.assert_close(found, by_parts)
        assert all(gradient.abs().max() > 1e-6 for gradient in by_parts)
        trained += parameters
    assert {*map(id, trained)} == {*map(id, module.parameters())}

    total = expected.sampler_loss + expected.coordinate_loss - expected.elbo - expected.log_joint
    torch.testing.assert_close(loss, total.mean())
    means = {"train/log_elbo": expected.elbo}
    if kind != "vae":
        for name in ("log_joint", "sampler_loss", "acceptance", "jump"):
            means[f"train/{name}"] = getattr(expected, name)
        means |= {"train/divergence": torch.zeros(1), "train/step_size": torch.tensor(0.4)}
    if module.coordinate_network is not None:
        means["train/coordinate_loss"] = expected.coordinate_loss
    wanted = {name: float(value.detach().mean()) for name, value in means.items()}
    assert attached.metrics == pytest.approx(wanted)


def test_a_kernel_in_coordinates_is_not_trained_at_every_update(attach: Attach) -> None:
    attached = attach("l2hmc in coordinates")
    sampler = list(attached.module.sampler.parameters())
    gradients = torch.autograd.grad(attached.loss(), sampler)
    assert all((gradient == 0).all() for gradient in gradients)  # the first is none
    assert "train/sampler_loss" not in attached.metrics


def test_all_batches_of_an_update_train_the_sampler_or_none(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = attach("l2hmc in coordinates")
    attached.module.trainer.accumulate_grad_batches = 2
    for step in range(TRAINED_EVERY):
        monkeypatch.setattr(DGLM, "global_step", step)
        for index in range(3):
            attached.metrics.clear()
            attached.loss(index)
            trained = "train/sampler_loss" in attached.metrics
            assert trained == (step == TRAINED_EVERY - 1)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("log_step_size", ()),
        ("position_network.heads.bias", (0,)),
        ("momentum_network.inputs.weight", (1, 2)),
        ("embedding.0.weight", (1, 2)),
    ],
)
def test_the_gradient_of_the_sampler_is_the_slope_of_its_loss(
    attach: Attach, name: str, index: tuple[int, ...]
) -> None:
    attached = attach("l2hmc")
    module, x, shift = attached.module, attached.x, 1e-6
    assert module.kernel is not None
    parameter = module.kernel.get_parameter(name)

    @torch.no_grad()
    def loss(change: float) -> float:
        generator = seeded_generator("cpu", module.seed, "training", 0, 0)
        q = module.posterior(x)
        parameter[index] += change
        value = module.chain(x, q, q.sample(generator), generator).loss.mean()
        parameter[index] -= change
        return float(value)

    slope = (loss(shift) - loss(-shift)) / (2 * shift)
    (found,) = torch.autograd.grad(attached.loss(), parameter)
    gradient = float(found[index])
    assert abs(gradient) > 1e-4
    assert gradient == pytest.approx(slope, rel=1e-5)


def test_a_training_step_is_a_function_of_seed_step_and_rank(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(kind: str, seed: int = 0, step: int = 0, rank: int = 0) -> float:
        monkeypatch.setattr(DGLM, "global_step", property(lambda module: step))
        monkeypatch.setattr(DGLM, "global_rank", property(lambda module: rank))
        attached = attach(kind, seed=seed)
        torch.seed()
        return attached.loss().item()

    for kind in KINDS:
        assert loss(kind, 1, 2, 3) == loss(kind, 1, 2, 3)
        keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
        assert len({loss(kind, *key) for key in keys}) == len(keys)


@pytest.mark.parametrize("kind", ["vae", "l2hmc"])  # HMC's step size follows each batch
def test_batches_that_one_update_accumulates_have_noise_of_their_own(
    attach: Attach, kind: str
) -> None:
    attached = attach(kind)
    attached.module.trainer.accumulate_grad_batches = 3
    losses = [attached.loss(index).item() for index in range(6)]
    assert len(set(losses[:3])) == 3
    assert losses[3:] == losses[:3]  # until an update is made


@pytest.mark.parametrize(("step_size", "sign"), [(1e-3, 1), (10.0, -1)])
def test_the_step_size_of_hmc_follows_its_acceptance(
    attach: Attach, step_size: float, sign: int
) -> None:
    attached = attach("hmc", step_size=step_size)
    kernel = attached.module.kernel
    assert isinstance(kernel, HMC)
    acceptance = by_hand(attached.module, attached.x).acceptance.mean()
    before = kernel.log_step_size.clone()
    attached.loss()
    change = kernel.log_step_size - before
    assert change.sign() == sign
    torch.testing.assert_close(change, 0.05 * (acceptance - ACCEPTANCE))


def test_trajectories_in_coordinates_are_shorter_than_half_a_period(attach: Attach) -> None:
    attached = attach("hmc in coordinates", step_size=10.0)
    attached.loss()
    kernel = attached.module.kernel
    assert kernel is not None
    assert float(kernel.step_size) * kernel.num_leapfrogs == pytest.approx(0.6 * math.pi)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_per_update_counts_the_gradients_of_all_steps(
    attach: Attach, gradients: list[int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = attach(kind)
    for step in range(TRAINED_EVERY):
        monkeypatch.setattr(DGLM, "global_step", step)
        attached.loss()
    twins = 2 * math.ceil(len(attached.x) / 4)
    images, siblings = gradients.count(len(attached.x)), gradients.count(twins)
    assert len(gradients) == images + siblings
    # Siblings are two of each image of a quarter of the batch.
    assert attached.module.gradients_per_update == (images + siblings * 2 / 4) / TRAINED_EVERY
    assert (siblings > 0) == (kind == "l2hmc in coordinates")
