import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
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
Gradients = dict[str, Tensor]

WITH_KERNEL = ["hmc", "l2hmc", "hmc in coordinates", "l2hmc in coordinates"]
KINDS = ["vae", *WITH_KERNEL]
STEPS = 3


def make_trainer(**arguments: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "num_sanity_val_steps": 0, "enable_checkpointing": False}
    return Trainer(**{**quiet, **defaults, **arguments})


class Batches:
    """A data loader of batches of eight binary images."""

    def __init__(self, count: int = STEPS) -> None:
        generator = seeded_generator("cpu", 17)
        self.batches = torch.rand(count, 8, 6, generator=generator).round().unbind()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


# What a training step computes, by hand


class ByHand:
    """U(z) = -log p(x, z) from torch.distributions and a copy of the decoder."""

    def __init__(self, decoder: nn.Module, x: Tensor, second_order: bool = True) -> None:
        self.decoder, self.x, self.second_order = (
            deepcopy(decoder).requires_grad_(False),
            x,
            second_order,
        )

    def __call__(self, z: Tensor) -> Tensor:
        return -log_joint(self.decoder, self.x, z)

    def value_and_gradient(self, position: Tensor) -> State:
        with torch.enable_grad():
            leaf = position if position.requires_grad else position.detach().requires_grad_()
            energy = self(leaf)
            (gradient,) = torch.autograd.grad(energy.sum(), leaf, create_graph=True)
        return State(position, energy, gradient if self.second_order else gradient.detach())


def log_joint(decoder: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    prior = Normal(0.0, 1.0).log_prob(z).sum(dim=-1)
    return prior + Bernoulli(logits=decoder(z)).log_prob(x).sum(dim=-1)


class Step(NamedTuple):
    """The parts of one training step, each (B,)."""

    elbo: Tensor
    sampler_losses: list[Tensor]
    """Of each Metropolis-Hastings step."""
    log_joint: Tensor
    jump: Tensor
    acceptance: Tensor
    coordinate_loss: Tensor


def by_hand(module: DGLM, x: Tensor, second_order: bool = True) -> Step:
    """Repeat the module's first training step."""
    decoder = module.model.decoder
    generator = seeded_generator("cpu", module.seed, "training", 0, 0)
    mean, log_std = module.encoder(x)
    z = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
    entropy = Normal(mean, log_std.exp()).entropy().sum(dim=-1)
    if module.kernel is None:
        elbo = log_joint(decoder, x, z) + entropy
        return Step(elbo, [], elbo, elbo, elbo, elbo)
    energy, losses, jumps, acceptances = ByHand(decoder, x, second_order), [], [], []
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
        losses.append(1 / jump - jump)
        jumps.append(distance * info.acceptance)
        acceptances.append(info.acceptance)
    return Step(
        entropy - energy(z),
        losses,
        log_joint(decoder, x, state.position.detach()),
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

    def gradients(self, loss: Tensor, part: str) -> Gradients:
        """Return the gradients of a loss in the "encoder", the "model" or the "kernel"."""
        named = dict(getattr(self.module, part).named_parameters())
        found = torch.autograd.grad(
            loss, list(named.values()), allow_unused=True, retain_graph=True
        )
        zeros = map(torch.zeros_like, named.values())
        pairs = zip(found, zeros, strict=True)
        return dict(zip(named, (zero if g is None else g for g, zero in pairs), strict=True))

    def training_gradients(self, part: str) -> Gradients:
        return self.gradients(self.module.training_step(self.x, 0), part)


Attach = Callable[..., Attached]


@pytest.fixture
def attach(build_dglm: BuildDGLM, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> Attach:
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


def distance(first: Gradients, second: Gradients) -> float:
    """Return the relative distance between two gradients."""
    one, other = (torch.cat([g.flatten() for g in part.values()]) for part in (first, second))
    return float((one - other).norm() / other.norm())


# Who gets which gradient


def test_encoder_and_decoder_of_the_vae_ascend_the_elbo(attach: Attach) -> None:
    attached = attach("vae")
    elbo = by_hand(attached.module, attached.x).elbo
    for part in ("encoder", "model"):
        expected = attached.gradients(-elbo.mean(), part)
        torch.testing.assert_close(attached.training_gradients(part), expected)
        assert all(gradient.abs().max() > 1e-6 for gradient in expected.values())


@pytest.mark.parametrize("kind", WITH_KERNEL)
def test_the_encoder_ascends_the_elbo_alone(attach: Attach, kind: str) -> None:
    attached = attach(kind)
    expected = attached.gradients(-by_hand(attached.module, attached.x).elbo.mean(), "encoder")
    torch.testing.assert_close(attached.training_gradients("encoder"), expected)
    assert all(gradient.abs().max() > 1e-6 for gradient in expected.values())


@pytest.mark.parametrize("kind", WITH_KERNEL)
def test_the_decoder_ascends_the_log_joint_at_the_end_of_the_chain_alone(
    attach: Attach, kind: str
) -> None:
    attached = attach(kind)
    expected = attached.gradients(-by_hand(attached.module, attached.x).log_joint.mean(), "model")
    torch.testing.assert_close(attached.training_gradients("model"), expected)
    assert all(gradient.abs().max() > 1e-6 for gradient in expected.values())


@pytest.mark.parametrize("kind", ["l2hmc", "l2hmc in coordinates"])
def test_the_sampler_descends_the_sum_of_its_losses_alone(attach: Attach, kind: str) -> None:
    attached = attach(kind)
    loss = torch.stack(by_hand(attached.module, attached.x).sampler_losses).sum(dim=0)
    assert attached.module.sampler is not None
    assert_trained(attached, loss, attached.module.sampler)


@pytest.mark.parametrize("kind", ["hmc in coordinates", "l2hmc in coordinates"])
def test_the_coordinates_descend_the_score_loss_at_the_end_of_the_chain_alone(
    attach: Attach, kind: str
) -> None:
    attached = attach(kind)
    assert attached.module.coordinates is not None
    loss = by_hand(attached.module, attached.x).coordinate_loss
    assert_trained(attached, loss, attached.module.coordinates)


def assert_trained(attached: Attached, loss: Tensor, part: nn.Module) -> None:
    """Check that a training step has the gradients of this loss in the parameters of this part."""
    parameters = list(part.parameters())
    expected = torch.autograd.grad(loss.mean(), parameters)
    found = torch.autograd.grad(attached.module.training_step(attached.x, 0), parameters)
    torch.testing.assert_close(found, expected)
    assert all(gradient.abs().max() > 1e-6 for gradient in expected)


def test_the_sampler_sees_second_derivatives_of_the_energy(attach: Attach) -> None:
    attached = attach("l2hmc")
    first = torch.stack(by_hand(attached.module, attached.x, second_order=False).sampler_losses)
    first_order = attached.gradients(first.sum(dim=0).mean(), "kernel")
    assert distance(first_order, attached.training_gradients("kernel")) > 0.01


def test_the_sampler_sees_every_step_of_the_chain(attach: Attach) -> None:
    attached = attach("l2hmc")
    found = attached.training_gradients("kernel")
    for loss in by_hand(attached.module, attached.x).sampler_losses:
        assert distance(attached.gradients(loss.mean(), "kernel"), found) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_reaches_every_parameter(attach: Attach, kind: str) -> None:
    attached = attach(kind)
    attached.module.training_step(attached.x, 0).backward()
    for name, parameter in attached.module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


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
    gradient = float(attached.training_gradients("kernel")[name][index])
    assert abs(gradient) > 1e-4
    assert gradient == pytest.approx(slope, rel=1e-5)


# What a training step is, does and logs


@pytest.mark.parametrize("kind", WITH_KERNEL)
def test_the_loss_and_the_metrics_are_those_by_hand(attach: Attach, kind: str) -> None:
    attached = attach(kind)
    expected = by_hand(attached.module, attached.x)
    sampler_loss = torch.stack(expected.sampler_losses).sum(dim=0)
    loss = attached.module.training_step(attached.x, 0)
    wanted = sampler_loss + expected.coordinate_loss - expected.elbo - expected.log_joint
    torch.testing.assert_close(loss, wanted.mean())
    means = {
        "train/log_elbo": expected.elbo,
        "train/log_joint": expected.log_joint,
        "train/sampler_loss": sampler_loss,
        "train/acceptance": expected.acceptance,
        "train/jump": expected.jump,
    }
    if attached.module.coordinates is not None:
        means["train/coordinate_loss"] = expected.coordinate_loss
    for name, value in means.items():
        assert attached.metrics[name] == pytest.approx(float(value.detach().mean()))
    assert attached.metrics["train/divergence"] == 0
    assert attached.metrics["train/step_size"] == pytest.approx(0.4)


def test_a_training_step_is_a_function_of_seed_step_and_rank(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(kind: str, seed: int = 0, step: int = 0, rank: int = 0) -> float:
        monkeypatch.setattr(DGLM, "global_step", property(lambda module: step))
        monkeypatch.setattr(DGLM, "global_rank", property(lambda module: rank))
        attached = attach(kind, seed=seed)
        torch.seed()
        return attached.module.training_step(attached.x, 0).item()

    for kind in KINDS:
        assert loss(kind) == loss(kind)
        assert loss(kind, 1, 2, 3) == loss(kind, 1, 2, 3)
        keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
        assert len({loss(kind, *key) for key in keys}) == len(keys)


@pytest.mark.parametrize("kind", ["vae", "l2hmc"])  # HMC's step size follows each batch
def test_batches_that_one_update_accumulates_have_noise_of_their_own(
    attach: Attach, kind: str
) -> None:
    attached = attach(kind)
    attached.module.trainer.accumulate_grad_batches = 3
    losses = [attached.module.training_step(attached.x, index).item() for index in range(6)]
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
    attached.module.training_step(attached.x, 0)
    change = kernel.log_step_size - before
    assert change.sign() == sign
    torch.testing.assert_close(change, 0.05 * (acceptance - 0.65))


@pytest.mark.parametrize("kind", WITH_KERNEL)
@pytest.mark.parametrize("num_mh_steps", [1, 3])
def test_gradients_per_update_counts_the_gradients_of_the_chain(
    build_dglm: BuildDGLM,
    images: Tensor,
    gradients: list[int],
    kind: str,
    num_mh_steps: int,
) -> None:
    module = build_dglm(kind, num_mh_steps=num_mh_steps)
    q = module.posterior(images)
    module.chain(images, q, q.sample())
    assert module.gradients_per_update == len(gradients)


def test_a_vae_takes_no_gradients_of_the_energy(build_dglm: BuildDGLM, images: Tensor) -> None:
    module = build_dglm("vae")
    assert module.gradients_per_update == 0
    with pytest.raises(ValueError, match="a VAE has no kernel"):
        module.chain(images, module.posterior(images), torch.zeros(7, 3))


@pytest.mark.parametrize("num_mh_steps", [0, -1])
def test_a_chain_of_training_has_at_least_one_step(
    build_dglm: BuildDGLM, num_mh_steps: int
) -> None:
    with pytest.raises(ValueError, match=f"num_mh_steps must be at least 1, got {num_mh_steps}"):
        build_dglm("hmc", num_mh_steps=num_mh_steps)


@pytest.mark.parametrize("name", ["decay_share", "sampler_share"])
@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_shares_are_shares(build_dglm: BuildDGLM, name: str, share: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must .*got {share}"):
        build_dglm("l2hmc", **{name: share})


class LearningRates(Callback):
    """Keeps the learning rate of each update."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        (optimizer,) = trainer.optimizers
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.found.append(rate)


@pytest.mark.parametrize("kind", KINDS)
def test_the_learning_rate_falls_in_the_last_part(
    build_dglm: BuildDGLM, kind: str, tmp_path: Path
) -> None:
    def fit(steps: int, resumed: Path | None = None) -> list[float]:
        rates = LearningRates()
        trainer = make_trainer(max_steps=steps, callbacks=[rates])
        module = build_dglm(kind, learning_rate=0.01, decay_share=0.4)
        trainer.fit(module, Batches(5), Batches(1), ckpt_path=resumed)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return rates.found

    falling = [0.01 * 0.03 ** (count / 4) for count in range(4)]
    assert fit(10) == pytest.approx([0.01] * 6 + falling)
    assert fit(5) == pytest.approx([0.01] * 4 + [falling[2]])
    # A resumed training is one of ten updates, of which the sixth follows.
    assert fit(10, tmp_path / "5.ckpt")[1:] == pytest.approx(falling)


def test_a_decay_needs_an_end(build_dglm: BuildDGLM) -> None:
    trainer = make_trainer(max_epochs=-1, max_time={"minutes": 1})
    with pytest.raises(ValueError, match="decay_share needs the training's length"):
        trainer.fit(build_dglm("vae", decay_share=0.5), Batches(2), Batches(1))


def test_the_learning_rate_is_constant_by_default(build_dglm: BuildDGLM) -> None:
    rates = LearningRates()
    make_trainer(max_steps=4, callbacks=[rates]).fit(build_dglm("vae"), Batches(4), Batches(1))
    assert rates.found == [1e-3] * 4


@pytest.mark.parametrize("jump_scale", [0.0, -1.0, math.nan])
def test_a_good_jump_has_a_length(build_dglm: BuildDGLM, jump_scale: float) -> None:
    with pytest.raises(ValueError, match=f"jump_scale must be positive, got {jump_scale}"):
        build_dglm("l2hmc", jump_scale=jump_scale)


class Forgetful(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)


def test_a_module_that_a_checkpoint_cannot_hold_is_refused_at_once() -> None:
    model = GenerativeModel(Forgetful(3, 6), 3)
    with pytest.raises(TypeError, match=r"Forgetful .*'inputs' as self\.inputs"):
        DGLM(model, Encoder(6, 3, (4,)))


# Training with Lightning


class Recorder(Callback):
    """Keeps the norms of the gradients before and after clipping."""

    def __init__(self) -> None:
        self.before: list[dict[str, float]] = []
        self.after: list[dict[str, float]] = []

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        self.before.append(self.norms(module))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        self.after.append(self.norms(module))

    def norms(self, module: LightningModule) -> dict[str, float]:
        parts = {"encoder": module.encoder, "model": module.model, "kernel": module.kernel}
        return {
            name: float(torch.cat([p.grad.flatten() for p in part.parameters()]).norm())  # type: ignore[union-attr]
            for name, part in parts.items()
            if isinstance(part, nn.Module) and list(part.parameters())
        }


def fit(module: DGLM, steps: int = STEPS, *callbacks: Callback) -> dict[str, Tensor]:
    """Train and return the state."""
    trainer = make_trainer(max_steps=steps, callbacks=list(callbacks))
    trainer.fit(module, Batches(steps), Batches(1))
    assert trainer.global_step == steps
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_everything_that_is_trained_and_repeats_itself(
    build_dglm: BuildDGLM, kind: str
) -> None:
    before = build_dglm(kind).state_dict()
    trained, again, other = (fit(build_dglm(kind, seed=seed)) for seed in (0, 0, 1))
    assert trained.keys() == before.keys()
    for name, value in trained.items():
        assert torch.equal(value, again[name]), name
        if "mask" in name:
            assert torch.equal(value, before[name])
            continue
        assert value.isfinite().all(), name
        assert not torch.equal(value, before[name]), name
        assert not torch.equal(value, other[name]), name


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_decoder_that_is_not_a_function_of_z_cannot_have_a_chain() -> None:
    decoder = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))
    module = DGLM(GenerativeModel(decoder, 3), Encoder(6, 3, (4,)), HMC(2))
    with pytest.raises(ValueError, match=r"depends on the other rows.*decoder\.eval\(\)"):
        fit(module)
    decoder.eval()
    fit(module)
    assert not decoder.training


def test_only_the_gradient_of_the_sampler_is_clipped(build_dglm: BuildDGLM) -> None:
    recorder = Recorder()
    # Such small steps have a loss, and a gradient, in the thousands.
    fit(build_dglm("l2hmc", step_size=0.01), STEPS, recorder)
    assert len(recorder.before) == len(recorder.after) == STEPS
    for before, after in zip(recorder.before, recorder.after, strict=True):
        assert before["kernel"] > 100
        assert after["kernel"] == pytest.approx(SAMPLER_GRADIENT_NORM)
        assert (after["encoder"], after["model"]) == (before["encoder"], before["model"])


def test_a_bound_on_all_gradients_is_refused(build_dglm: BuildDGLM) -> None:
    trainer = make_trainer(max_steps=1, gradient_clip_val=1.0)
    with pytest.raises(ValueError, match=r"gradient_clip_val would be ignored.*norm 5"):
        trainer.fit(build_dglm("l2hmc"), Batches(), Batches())


def test_small_gradients_of_the_sampler_are_left_alone(build_dglm: BuildDGLM) -> None:
    module = build_dglm("l2hmc")
    parameters = list(module.kernel.parameters())  # type: ignore[union-attr]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    parameters[1].grad[0] = 4.9  # type: ignore[index]
    before = [parameter.grad.clone() for parameter in parameters]  # type: ignore[union-attr]
    module.configure_gradient_clipping()
    assert all(map(torch.equal, before, [parameter.grad for parameter in parameters]))


@pytest.mark.parametrize("kind", WITH_KERNEL)
def test_a_resumed_run_repeats_the_uninterrupted_one(
    build_dglm: BuildDGLM, kind: str, tmp_path: Path
) -> None:
    def trained(epochs: int, checkpoint: Path | None = None) -> tuple[Trainer, DGLM]:
        module, trainer = build_dglm(kind), make_trainer(max_epochs=epochs)
        trainer.fit(module, Batches(2), Batches(1), ckpt_path=checkpoint, weights_only=True)
        return trainer, module

    whole, half, resumed = trained(2)[1], trained(1)[0], tmp_path / "half.ckpt"
    half.save_checkpoint(resumed)
    for found, wanted in zip(
        trained(2, resumed)[1].state_dict().values(), whole.state_dict().values(), strict=True
    ):
        assert torch.equal(found, wanted)


class Modes(Callback):
    """Keeps whether validation ran in inference mode."""

    def __init__(self) -> None:
        self.inference: list[bool] = []

    def on_validation_batch_start(self, *_: object) -> None:
        self.inference.append(torch.is_inference_mode_enabled())


@pytest.mark.parametrize("kind", KINDS)
def test_validation_runs_in_inference_mode_and_changes_nothing(
    build_dglm: BuildDGLM, kind: str
) -> None:
    module, modes = build_dglm(kind), Modes()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = make_trainer(callbacks=[modes])
    (metrics,), (again,) = (trainer.validate(module, Batches(), verbose=False) for _ in range(2))
    assert modes.inference == [True] * 2 * STEPS
    assert metrics == again
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    names = {"log_elbo", "log_joint_q"}
    if kind != "vae":
        names |= {"log_joint", "acceptance", "divergence"}
    assert set(metrics) == {f"validation/{name}" for name in names}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_validation_logs_what_a_chain_does(build_dglm: BuildDGLM, kind: str) -> None:
    module, batches = build_dglm(kind), Batches()
    (metrics,) = make_trainer().validate(module, batches, verbose=False)
    expected: dict[str, list[float]] = {name.removeprefix("validation/"): [] for name in metrics}
    for index, x in enumerate(batches):
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
    for name, values in expected.items():
        assert metrics[f"validation/{name}"] == pytest.approx(sum(values) / STEPS), name


# Anyone's data and devices

TRAINING_ALONE = pytest.mark.filterwarnings("ignore:You defined a .validation_step")


@TRAINING_ALONE
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
    likelihood: Any, pixels: Callable[[Tensor], Tensor], message: str
) -> None:
    x = pixels(torch.rand(20, 6))
    module = DGLM(GenerativeModel(nn.Linear(3, 6), 3, likelihood), Encoder(6, 3, (4,)))
    with pytest.raises(ValueError, match=message):
        make_trainer(devices=1, max_epochs=1).fit(module, DataLoader(x, 10))  # type: ignore[arg-type]
    assert module.safeguard.updates == 0


def test_labels_are_left_out_and_images_flattened(build_dglm: BuildDGLM) -> None:
    x, weights = torch.rand(20, 6).round().float(), []
    for data in (x, TensorDataset(x.view(20, 1, 2, 3), torch.arange(20))):
        module = build_dglm("hmc")
        trainer = make_trainer(devices=1, max_epochs=1)
        loader: Any = DataLoader(data, 10)  # type: ignore[arg-type]
        trainer.fit(module, loader, loader)
        weights.append(module.state_dict())
        drawn = trainer.predict(module, loader)
        assert [z.shape for z in drawn] == [(10, 3), (10, 3)]  # type: ignore[union-attr]
        again = trainer.predict(module, loader)
        assert all(map(torch.equal, drawn, again))  # type: ignore[arg-type]
        assert not torch.equal(*drawn)  # type: ignore[misc]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@TRAINING_ALONE
@pytest.mark.filterwarnings("ignore:the steps of a DGLM are not compiled")
@pytest.mark.parametrize("kind", ["vae", "hmc"])
def test_a_compiled_module_trains_as_it_is(build_dglm: BuildDGLM, kind: str) -> None:
    plain, compiled = build_dglm(kind), build_dglm(kind)
    make_trainer(devices=1, max_epochs=1).fit(plain, Batches())
    make_trainer(devices=1, max_epochs=1).fit(torch.compile(compiled, backend="eager"), Batches())  # type: ignore[arg-type]
    found = compiled.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in plain.state_dict().items())


@TRAINING_ALONE
def test_64_bit_training_is_in_float64() -> None:
    torch.set_default_dtype(torch.float32)
    module = DGLM(GenerativeModel(nn.Linear(3, 6), 3), Encoder(6, 3, (4,)), HMC(2))
    trainer = make_trainer(devices=1, max_epochs=1, precision="64-true")
    trainer.fit(module, DataLoader(torch.rand(20, 6), 10))  # type: ignore[arg-type]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}


# Log-likelihood

FEW_CHAINS = pytest.mark.filterwarnings("ignore:the log-likelihoods of")


def estimate(module: DGLM, batches: Batches) -> dict[str, float]:
    trainer = make_trainer(devices=1)
    (metrics,) = trainer.test(module, batches, verbose=False)
    return metrics  # type: ignore[return-value]


@FEW_CHAINS
@pytest.mark.parametrize("start", ["prior", "encoder", "fitted"])
def test_testing_estimates_the_log_likelihood_by_ais(build_dglm: BuildDGLM, start: str) -> None:
    module, reported = build_dglm("hmc"), []
    module.ais, module.ais_start = AISSettings(4, 5, 2, seed=3), start  # type: ignore[assignment]
    module.test_progress = reported.append
    metrics, estimates = estimate(module, Batches()), []
    for index, x in enumerate(Batches()):
        starts = {"encoder": module.encoder, "fitted": FittedStart(module.encoder)}
        settings = AISSettings(4, 5, 2, seed=mixed_seed(3, index, 0))
        begin: Any = starts.get(start, "prior")
        estimates.append(estimate_log_likelihood(module.model, x, settings, begin))
    for found, parts in zip(
        module.test_result[:5], list(zip(*estimates, strict=True))[:5], strict=True
    ):
        torch.testing.assert_close(found, torch.cat(parts), equal_nan=True)
    cost = sum(estimate.gradient_evaluations for estimate in estimates)
    assert module.test_result.gradient_evaluations == sum(reported) == cost
    log_likelihood = torch.cat([estimate.log_likelihood for estimate in estimates])
    assert metrics["test/log_likelihood"] == pytest.approx(float(log_likelihood.mean()))
    error = log_likelihood.std() / len(log_likelihood) ** 0.5
    assert metrics["test/standard_error"] == pytest.approx(float(error))


@FEW_CHAINS
def test_estimates_of_an_earlier_run_are_kept(build_dglm: BuildDGLM) -> None:
    def fresh() -> DGLM:
        module = build_dglm("vae")
        module.ais, module.ais_start = AISSettings(2, 3, 1), "prior"
        return module

    whole, resumed, reported = fresh(), fresh(), []
    estimate(whole, Batches())
    estimates = {
        index: estimate_log_likelihood(
            whole.model, x, AISSettings(2, 3, 1, seed=mixed_seed(0, index, 0)), "prior"
        )
        for index, x in enumerate(Batches())
    }
    resumed.test_results = {1: estimates[1]}
    resumed.test_progress = reported.append
    estimate(resumed, Batches())
    assert torch.equal(resumed.test_result.log_weights, whole.test_result.log_weights)
    assert sum(reported) == sum(estimates[index].gradient_evaluations for index in (0, 2))


@FEW_CHAINS
def test_testing_again_on_other_images_estimates_again(build_dglm: BuildDGLM) -> None:
    module = build_dglm("vae")
    module.ais = AISSettings(2, 3, 1)
    first, others = Batches(1), Batches(1)
    others.batches = tuple(1 - x for x in first.batches)
    assert estimate(module, first) != estimate(module, others)


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
    summary = {
        "kernel": type(module.kernel).__name__,
        "num_mh_steps": module.num_mh_steps,
        "learning_rate": module.learning_rate,
        "seed": module.seed,
        "jump_scale": module.jump_scale,
        "decay_share": module.decay_share,
    }
    torch.save((module.state_dict(), samples, summary), path + ".loaded")
"""


class Saved(NamedTuple):
    """A trained module and the checkpoint of it."""

    module: DGLM
    path: Path
    x: Tensor


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
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
        model = GenerativeModel(decoder, 3)
        module = DGLM(
            model, Encoder(6, 3, (4,)), kernel, 3, 0.01, seed=9, jump_scale=2, decay_share=0.5
        )
        trainer, path = make_trainer(max_steps=2), folder / f"{kind}.ckpt"
        trainer.fit(module, Batches(2), Batches(1))
        trainer.save_checkpoint(path)
        x = next(iter(Batches()))
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
def test_a_checkpoint_loads_in_a_fresh_process(checkpoints: dict[str, Saved], kind: str) -> None:
    module, path, x = checkpoints[kind]
    state, samples, summary = torch.load(f"{path}.loaded", weights_only=True)
    names = {"vae": "NoneType", "hmc": "HMC", "l2hmc": "L2HMC"}
    name = names.get(kind, "AmortizedPreconditioned")
    settings = {"num_mh_steps": 3, "learning_rate": 0.01, "seed": 9}
    settings |= {"jump_scale": 2, "decay_share": 0.5}
    assert summary == {"kernel": name, **settings}
    assert state.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(samples, module.posterior_samples(x, generator=seeded_generator("cpu", 5)))
    assert any("mask" in name for name in state) == kind.startswith("l2hmc")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_plain_data_only(checkpoints: dict[str, Saved], kind: str) -> None:
    content = torch.load(checkpoints[kind].path, weights_only=True)["hyper_parameters"]

    def leaves(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from leaves(item)
        else:
            yield value

    assert {type(leaf) for leaf in leaves(content)} <= {bool, int, float, str, type(None)}


def test_settings_can_be_changed_when_a_checkpoint_is_loaded(
    checkpoints: dict[str, Saved],
) -> None:
    module = DGLM.load_from_checkpoint(checkpoints["hmc"].path, num_mh_steps=8, weights_only=True)
    assert module.num_mh_steps == 8
