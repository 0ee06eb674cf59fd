import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
)
from torch.utils.data import DataLoader, TensorDataset

import dglm
from dglm import (
    DGLM,
    AISResult,
    AISSettings,
    Encoder,
    FittedStart,
    Gaussian,
    GenerativeModel,
    estimate_log_likelihood,
)
from dglm.coordinates import AmortizedPreconditioned, GaussianNetwork
from dglm.module import SAMPLER_GRADIENT_NORM
from samplers import HMC, L2HMC, Kernel, State, seeded_generator
from samplers.random import mixed_seed

BuildDGLM = Callable[..., DGLM]
MakeTrainer = Callable[..., Trainer]
MakeBatches = Callable[[int], Iterable[Tensor]]
Fit = Callable[..., Trainer]

WITH_KERNEL = ["hmc", "l2hmc", "hmc in coordinates", "l2hmc in coordinates"]
KINDS = ["vae", *WITH_KERNEL]
STEPS = 3


# What a training step computes, by hand


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
        others = (self.sampler_loss, module.sampler), (self.coordinate_loss, module.coordinates)
        return pairs + [(loss, part) for loss, part in others if part and [*part.parameters()]]


def by_hand(module: DGLM, x: Tensor) -> Step:
    """Repeat the module's first training step."""
    decoder = module.model.decoder
    generator = seeded_generator("cpu", module.seed, "training", 0, 0)
    mean, log_std = module.encoder(x)
    z = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
    entropy = Normal(mean, log_std.exp()).entropy().sum(dim=-1)
    if module.kernel is None:
        elbo = log_joint(decoder, x, z) + entropy
        return Step(elbo, *5 * [torch.zeros_like(elbo)])
    energy, losses, jumps, acceptances = ByHand(decoder, x), [], [], []
    context, state = module.kernel.embed(x), energy.value_and_gradient(z.detach())
    posterior: Distribution = Independent(Normal(mean, log_std.exp()), 1)
    if module.coordinates is not None:
        mean, factor = module.coordinates(x)
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
    return Step(
        entropy - energy(z),
        log_joint(decoder, x, state.position.detach()),
        torch.stack(losses).sum(dim=0),
        torch.stack(jumps).mean(dim=0),
        torch.stack(acceptances).mean(dim=0),
        score_difference(posterior, state).div(3).log1p().mul(1.5)
        if isinstance(posterior, MultivariateNormal)
        else torch.zeros(len(x)),
    )


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
    attach: Attach, kind: str
) -> None:
    attached = attach(kind, jump_scale=1.5)
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
    if module.coordinates is not None:
        means["train/coordinate_loss"] = expected.coordinate_loss
    wanted = {name: float(value.detach().mean()) for name, value in means.items()}
    assert attached.metrics == pytest.approx(wanted)


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


# What a training step is, does and logs


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
    torch.testing.assert_close(change, 0.05 * (acceptance - 0.65))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_per_update_counts_the_gradients_of_a_step(
    attach: Attach, gradients: list[int], kind: str
) -> None:
    attached = attach(kind)
    attached.loss()
    assert attached.module.gradients_per_update == len(gradients)


class LearningRates(Callback):
    """Keeps the learning rate of each update."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        (optimizer,) = trainer.optimizers
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.found.append(rate)


@pytest.mark.parametrize("kind", KINDS)
def test_the_learning_rate_falls_in_the_last_part_where_that_is_asked_for(
    build_dglm: BuildDGLM, fit: Fit, kind: str, tmp_path: Path
) -> None:
    def rates(steps: int, resumed: Path | None = None, **options: float) -> list[float]:
        found = LearningRates()
        module = build_dglm(kind, learning_rate=0.01, **options)
        fit(module, steps, found, epoch=5, checkpoint=resumed).save_checkpoint(
            tmp_path / f"{steps}.ckpt"
        )
        return found.found

    falling = [0.01 * 0.03 ** (count / 4) for count in range(4)]
    assert rates(10, decay_share=0.4) == pytest.approx([0.01] * 6 + falling)
    assert rates(5, decay_share=0.4) == pytest.approx([0.01] * 4 + [falling[2]])
    # A resumed training is one of ten updates, of which the sixth follows.
    assert rates(10, tmp_path / "5.ckpt", decay_share=0.4)[1:] == pytest.approx(falling)
    assert rates(4) == [0.01] * 4


# Training with Lightning


@pytest.mark.parametrize("size", [1e-3, 10.0])
def test_the_gradient_of_the_sampler_alone_is_clipped_where_it_is_large(
    build_dglm: BuildDGLM, size: float
) -> None:
    module = build_dglm("l2hmc in coordinates")
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, size)
    module.configure_gradient_clipping()
    clipped = list(module.sampler.parameters())
    norm = size * sum(parameter.numel() for parameter in clipped) ** 0.5
    assert (norm > SAMPLER_GRADIENT_NORM) == (size > 1)
    for parameter in module.parameters():
        own = any(parameter is each for each in clipped)
        wanted = size * min(1.0, SAMPLER_GRADIENT_NORM / norm) if own else size
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_everything_that_is_trained_and_repeats_itself(
    build_dglm: BuildDGLM, fit: Fit, kind: str
) -> None:
    before, modules = build_dglm(kind).state_dict(), [build_dglm(kind, seed=s) for s in (0, 0, 1)]
    for module in modules:
        fit(module)
    trained, again, other = (module.state_dict() for module in modules)
    assert trained.keys() == before.keys()
    for name, value in trained.items():
        assert torch.equal(value, again[name]), name
        if "mask" in name:
            assert torch.equal(value, before[name])
            continue
        assert value.isfinite().all(), name
        assert not torch.equal(value, before[name]), name
        assert not torch.equal(value, other[name]), name


def batch_norm() -> DGLM:
    decoder = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))
    return DGLM(GenerativeModel(decoder, 3), Encoder(6, 3, (4,)), HMC(2))


def other_sizes() -> DGLM:
    return DGLM(GenerativeModel(nn.Linear(3, 6), 3), Encoder(5, 3, (4,)))


class Forgetful(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (batch_norm, {}, r"depends on the other rows.*decoder\.eval\(\)"),
        (other_sizes, {}, "encoder does not take observations of 6"),
        (lambda: DGLM(GenerativeModel(Forgetful(3, 6), 3), Encoder(6, 3, (4,))), {}, "Forgetful"),
        (None, {"gradient_clip_val": 1.0}, "gradient_clip_val would be ignored.*norm 5"),
        (None, {"precision": "bf16-true"}, "precision bf16-true is too low for exact chains"),
        (None, {"precision": "16-true"}, "precision 16-true is too low for exact chains"),
        (None, {"max_steps": -1, "max_epochs": -1}, "decay_share needs the training's length"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*precision.*training.*:UserWarning")
def test_what_would_not_train_is_refused_before_it_does(
    build: Any, options: dict[str, Any], message: str, build_dglm: BuildDGLM, fit: Fit
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fit(build() if build else build_dglm("hmc", decay_share=0.5), 1, **options)


@pytest.mark.parametrize("kind", WITH_KERNEL)
def test_a_resumed_run_repeats_the_uninterrupted_one(
    build_dglm: BuildDGLM, fit: Fit, kind: str, tmp_path: Path
) -> None:
    whole, half, resumed = (build_dglm(kind) for _ in range(3))
    fit(whole, 4, epoch=2)
    fit(half, 2, epoch=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 4, epoch=2, checkpoint=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


class Modes(Callback):
    """Keeps whether validation ran in inference mode."""

    def __init__(self) -> None:
        self.inference: list[bool] = []

    def on_validation_batch_start(self, *_: object) -> None:
        self.inference.append(torch.is_inference_mode_enabled())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_validation_logs_what_a_chain_does_and_changes_nothing(
    build_dglm: BuildDGLM, make_trainer: MakeTrainer, batches: MakeBatches, kind: str
) -> None:
    module, modes = build_dglm(kind), Modes()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = make_trainer(callbacks=[modes])
    (metrics,), (again,) = (trainer.validate(module, batches(3), verbose=False) for _ in range(2))
    assert modes.inference == [True] * 2 * 3
    assert metrics == again
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    names = ["log_elbo", "log_joint_q"]
    names += [] if kind == "vae" else ["log_joint", "acceptance", "divergence"]
    expected: dict[str, list[float]] = {name: [] for name in names}
    for index, x in enumerate(batches(3)):
        generator = seeded_generator("cpu", 0, "validation", index, 0)
        q = module.posterior(x)
        z = q.sample(generator)
        joint = log_joint(module.model.decoder, x, z)
        entropy = Normal(q.mean, q.log_std.exp()).entropy().sum(dim=-1)
        expected["log_elbo"].append(float((joint + entropy).mean()))
        expected["log_joint_q"].append(float(joint.mean()))
        if module.kernel is not None:
            chain = module.chain(x, q, z, generator)
            end = log_joint(module.model.decoder, x, chain.state.position)
            expected["log_joint"].append(float(end.mean()))
            expected["acceptance"].append(float(chain.acceptance.mean()))
            expected["divergence"].append(0.0)
    wanted = {f"validation/{name}": sum(values) / 3 for name, values in expected.items()}
    assert metrics == pytest.approx(wanted)


# Anyone's data and devices


@pytest.mark.filterwarnings("ignore:You defined a .validation_step")
@pytest.mark.parametrize(
    ("likelihood", "pixels", "message"),
    [
        (None, lambda x: (x - 0.1307) / 0.3081, r"in \[0, 1\], got .*Normalize"),
        (None, lambda x: 2 * x - 1, r"in \[0, 1\]"),
        (None, lambda x: 255 * x, "divide images of 0 to 255 by 255"),
        (None, lambda x: x[:, :4], "images of 6 numbers"),
        (Gaussian(), lambda x: x / 0, "NaN or infinite"),
    ],
)
def test_what_testing_refuses_is_refused_in_the_first_batch_of_training(
    likelihood: Any, pixels: Callable[[Tensor], Tensor], message: str, make_trainer: MakeTrainer
) -> None:
    x = pixels(torch.rand(20, 6))
    module = DGLM(GenerativeModel(nn.Linear(3, 6), 3, likelihood), Encoder(6, 3, (4,)))
    with pytest.raises(ValueError, match=message):
        make_trainer(devices=1, max_epochs=1).fit(module, DataLoader(x, 10))
    assert module.safeguard.updates == 0


def test_labels_are_left_out_and_images_flattened(
    build_dglm: BuildDGLM, make_trainer: MakeTrainer
) -> None:
    x, weights = torch.rand(20, 6).round().float(), []
    for data in (x, TensorDataset(x.view(20, 1, 2, 3), torch.arange(20))):
        module, loader = build_dglm("hmc"), DataLoader(data, 10)
        trainer = make_trainer(devices=1, max_epochs=1)
        trainer.fit(module, loader, loader)
        weights.append(module.state_dict())
        drawn = trainer.predict(module, loader)
        assert [z.shape for z in drawn] == [(10, 3), (10, 3)]
        assert all(map(torch.equal, drawn, trainer.predict(module, loader)))
        assert not torch.equal(*drawn)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.filterwarnings("ignore:the steps of a DGLM are not compiled")
@pytest.mark.parametrize("kind", ["vae", "hmc"])
def test_a_compiled_module_trains_as_it_is(build_dglm: BuildDGLM, fit: Fit, kind: str) -> None:
    plain, compiled = build_dglm(kind), build_dglm(kind)
    fit(plain)
    fit(torch.compile(compiled, backend="eager"))
    found = compiled.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in plain.state_dict().items())


# Log-likelihood

FEW_CHAINS = pytest.mark.filterwarnings("ignore:the log-likelihoods of")


def score(module: DGLM, x: Tensor, index: int) -> AISResult:
    """Estimate as a module's test does, in the batch of this number."""
    starts = {"encoder": module.encoder, "fitted": FittedStart(module.encoder)}
    settings = replace(module.ais, seed=mixed_seed(module.ais.seed, index, 0))
    start: Any = starts.get(module.ais_start, "prior")
    return estimate_log_likelihood(module.model, x, settings, start)


@FEW_CHAINS
@pytest.mark.parametrize("start", ["prior", "encoder", "fitted"])
def test_testing_estimates_the_log_likelihood_by_ais(
    build_dglm: BuildDGLM, make_trainer: MakeTrainer, batches: MakeBatches, start: str
) -> None:
    module, reported = build_dglm("hmc"), []
    module.ais, module.ais_start = AISSettings(4, 5, 2, seed=3), start
    module.test_progress = reported.append
    (metrics,) = make_trainer(devices=1).test(module, batches(3), verbose=False)
    estimates = [score(module, x, index) for index, x in enumerate(batches(3))]
    parts = zip(*estimates, strict=True)
    for found, wanted in zip(module.test_result[:5], parts, strict=False):
        torch.testing.assert_close(found, torch.cat(wanted), equal_nan=True)
    cost = sum(estimate.gradient_evaluations for estimate in estimates)
    assert module.test_result.gradient_evaluations == sum(reported) == cost
    log_likelihood = torch.cat([estimate.log_likelihood for estimate in estimates])
    error = log_likelihood.std() / len(log_likelihood) ** 0.5
    wanted = {"log_likelihood": log_likelihood.mean(), "standard_error": error}
    assert metrics == pytest.approx({f"test/{k}": float(v) for k, v in wanted.items()})


@FEW_CHAINS
def test_estimates_of_an_earlier_run_are_kept_for_one_test(
    build_dglm: BuildDGLM, make_trainer: MakeTrainer, batches: MakeBatches
) -> None:
    module, reported = build_dglm("vae"), []
    module.ais, module.ais_start = AISSettings(2, 3, 1), "prior"
    module.test_progress = reported.append
    estimates = [score(module, x, index) for index, x in enumerate(batches(3))]
    for kept in ([1], []):
        reported.clear()
        module.test_results = {index: estimates[index] for index in kept}
        make_trainer(devices=1).test(module, batches(3), verbose=False)
        weights = torch.cat([estimate.log_weights for estimate in estimates])
        assert torch.equal(module.test_result.log_weights, weights)
        cost = [each.gradient_evaluations for i, each in enumerate(estimates) if i not in kept]
        assert sum(reported) == sum(cost)
        assert module.test_results == {}


# Checkpoints

LOADER = """
import sys
import torch
from dglm import DGLM
from samplers import seeded_generator

for path in sys.argv[1:]:
    module = DGLM.load_from_checkpoint(path, weights_only=True)
    x = torch.load(path + ".images", weights_only=True)
    samples = module.posterior_samples(x, generator=seeded_generator("cpu", 5))
    names = "num_mh_steps", "learning_rate", "seed", "jump_scale", "decay_share"
    summary = {name: getattr(module, name) for name in names}
    torch.save((repr(module), module.state_dict(), samples, summary), path + ".loaded")
"""


SETTINGS: dict[str, Any] = {
    "num_mh_steps": 3,
    "learning_rate": 0.01,
    "seed": 9,
    "jump_scale": 2,
    "decay_share": 0.5,
}


class Saved(NamedTuple):
    """A trained module and the checkpoint of it."""

    module: DGLM
    path: Path
    x: Tensor


@pytest.fixture(scope="module")
def checkpoints(
    fit: Fit, batches: MakeBatches, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Saved]:
    """Checkpoints of trained modules that a fresh process, told their path alone, has loaded."""
    folder, saved = tmp_path_factory.mktemp("checkpoints"), {}
    hmc = HMC(2, 0.4)
    l2hmc = L2HMC(3, 4, 0.4, 5, head_scale=1.0, observation_dim=6, embedding_hidden=(4,))
    network = GaussianNetwork(6, 3, (4,))
    kernels: dict[str, Kernel | None] = {
        "vae": None,
        "hmc": hmc,
        "l2hmc": l2hmc,
        "hmc in coordinates": AmortizedPreconditioned(deepcopy(hmc), network),
        "l2hmc in coordinates": AmortizedPreconditioned(deepcopy(l2hmc), deepcopy(network)),
    }
    for kind, kernel in kernels.items():
        decoder = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Softplus(), nn.Linear(5, 6))
        model, path = GenerativeModel(decoder, 3), folder / f"{kind}.ckpt"
        module = DGLM(model, Encoder(6, 3, (4,)), kernel, **SETTINGS)
        fit(module, 2).save_checkpoint(path)
        (x,) = batches(1)
        torch.save(x, f"{path}.images")
        saved[kind] = Saved(module, path, x)
    root = str(Path(dglm.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", LOADER, *(str(item.path) for item in saved.values())],
        check=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
    )
    return saved


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_plain_data_loads_in_a_fresh_process(
    checkpoints: dict[str, Saved], kind: str
) -> None:
    module, path, x = checkpoints[kind]
    parts, state, samples, settings = torch.load(f"{path}.loaded", weights_only=True)
    assert parts == repr(module)
    assert settings == SETTINGS
    assert state.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(samples, module.posterior_samples(x, generator=seeded_generator("cpu", 5)))
    assert any("mask" in name for name in state) == kind.startswith("l2hmc")
    assert json.dumps(torch.load(path, weights_only=True)["hyper_parameters"])
    changed = DGLM.load_from_checkpoint(path, num_mh_steps=8, weights_only=True)
    assert changed.num_mh_steps == 8
