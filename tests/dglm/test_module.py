"""A module in Lightning's hands: training, validation, scores, checkpoints."""

import json
import os
import pickle
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
from torch.distributions import Normal
from torch.utils.data import DataLoader, TensorDataset

import dglm
from dglm import (
    DGLM,
    AISResult,
    AISSettings,
    Bernoulli,
    Encoder,
    FittedStart,
    Gaussian,
    GenerativeModel,
    RefinedStart,
    estimate_log_likelihood,
)
from dglm.chain import TRAINED_EVERY
from dglm.coordinates import AmortizedPreconditioned, GaussianNetwork
from dglm.likelihoods import Likelihood
from dglm.module import SAMPLER_GRADIENT_NORM
from samplers import HMC, L2HMC, Kernel, seeded_generator
from samplers.random import mixed_seed

BuildDGLM = Callable[..., DGLM]
MakeTrainer = Callable[..., Trainer]
MakeBatches = Callable[[int], Iterable[Tensor]]
Fit = Callable[..., Trainer]

WITH_KERNEL = ["hmc", "l2hmc", "hmc in coordinates", "l2hmc in coordinates"]
KINDS = ["vae", *WITH_KERNEL]


class LearningRates(Callback):
    """Keeps the learning rate of each update."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        (optimizer,) = trainer.optimizers
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.found.append(rate)


@pytest.mark.parametrize("kind", KINDS)
def test_the_learning_rate_rises_first_and_falls_in_the_last_part_where_that_is_asked_for(
    build_dglm: BuildDGLM, fit: Fit, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rates(steps: int, resumed: Path | None = None, **options: float) -> list[float]:
        found = LearningRates()
        module = build_dglm(kind, learning_rate=0.01, **options)
        fit(module, steps, found, epoch=5, checkpoint=resumed).save_checkpoint(
            tmp_path / f"{steps}.ckpt"
        )
        return found.found

    assert rates(3) == pytest.approx([0.0001, 0.0002, 0.0003])
    monkeypatch.setattr("dglm.module._WARM_UP", 2)
    falling = [0.01 * 0.03 ** (count / 4) for count in range(4)]
    assert rates(10, decay_share=0.4) == pytest.approx([0.005] + [0.01] * 5 + falling)
    assert rates(5, decay_share=0.4) == pytest.approx([0.005] + [0.01] * 3 + [falling[2]])
    # A resumed training is one of ten updates, of which the sixth follows.
    assert rates(10, tmp_path / "5.ckpt", decay_share=0.4)[1:] == pytest.approx(falling)
    assert rates(4) == [0.005, 0.01, 0.01, 0.01]


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
        fit(module, steps=TRAINED_EVERY)
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
        (None, {"gradient_clip_val": 1.0}, "gradient_clip_val would be ignored"),
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
        joint = module.model.log_joint(x, z)
        entropy = Normal(q.mean, q.log_std.exp()).entropy().sum(dim=-1)
        expected["log_elbo"].append(float((joint + entropy).mean()))
        expected["log_joint_q"].append(float(joint.mean()))
        if module.kernel is not None:
            chain = module.chain(x, q, z, generator)
            end = module.model.log_joint(x, chain.state.position)
            expected["log_joint"].append(float(end.mean()))
            expected["acceptance"].append(float(chain.acceptance.mean()))
            expected["divergence"].append(0.0)
    wanted = {f"validation/{name}": sum(values) / 3 for name, values in expected.items()}
    assert metrics == pytest.approx(wanted)


# Anyone's data and devices


@pytest.mark.filterwarnings("ignore:You defined a .validation_step")
@pytest.mark.parametrize(("kernel", "sound_batches"), [(lambda: None, 2), (HMC, 0)])
@pytest.mark.parametrize(
    ("likelihood", "pixels", "message"),
    [
        (Bernoulli, lambda x: (x - 0.1307) / 0.3081, r"in \[0, 1\], got .*Normalize"),
        (Bernoulli, lambda x: 2 * x - 1, r"in \[0, 1\]"),
        (Bernoulli, lambda x: 255 * x, "divide images of 0 to 255 by 255"),
        (Bernoulli, lambda x: x[:, :4], "images of 6 numbers"),
        (Gaussian, lambda x: x / 0, "NaN or infinite"),
    ],
)
def test_what_testing_refuses_is_refused_in_the_first_batch_that_holds_it(
    likelihood: Callable[[], Likelihood],
    pixels: Callable[[Tensor], Tensor],
    message: str,
    sound_batches: int,
    kernel: Callable[[], Kernel | None],
    make_trainer: MakeTrainer,
) -> None:
    sound = torch.rand(10 * sound_batches, 6)
    loader = DataLoader([*sound, *pixels(torch.rand(10, 6))], 10)  # type: ignore[arg-type]
    module = DGLM(GenerativeModel(nn.Linear(3, 6), 3, likelihood()), Encoder(6, 3, (4,)), kernel())
    trainer = make_trainer(devices=1, max_epochs=1)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, loader)
    assert trainer.global_step == sound_batches
    with pytest.raises(ValueError, match=message):
        make_trainer(devices=1).validate(module, loader, verbose=False)


class Sometimes(nn.Module):
    """Random in training alone, or always."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always
        self.layers = nn.Sequential(nn.Linear(3, 6), nn.Dropout(), nn.BatchNorm1d(6))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z) + self.always * torch.rand(())


def test_the_decoder_of_a_vae_may_be_random_in_training_alone(fit: Fit) -> None:
    def vae(always: bool) -> DGLM:
        return DGLM(GenerativeModel(Sometimes(always), 3), Encoder(6, 3, (4,)))

    assert fit(vae(False), 2).global_step == 2
    with pytest.raises(ValueError, match="something else each time"):
        fit(vae(True), 2)


def test_training_notes_its_metrics_where_a_logger_writes_them_and_as_epochs_end(
    build_dglm: BuildDGLM, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = []

    def log(module: DGLM, name: str, *rest: Any, **options: Any) -> None:
        if name.startswith("train/"):
            noted.append(module.global_step)

    monkeypatch.setattr(DGLM, "log", log)
    fit(build_dglm("vae"), 8, epoch=4, log_every_n_steps=3)
    assert noted == [2, 3, 5, 7]


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
        by_hand = seeded_generator("cpu", 0, "prediction", 0, 0)
        assert torch.equal(drawn[0], module.posterior_samples(x[:10], generator=by_hand))
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
    starts = {
        "encoder": module.encoder,
        "coordinates": RefinedStart(module.kernel),
        "fitted": FittedStart(module.encoder),
    }
    settings = replace(module.ais, seed=mixed_seed(module.ais.seed, index, 0))
    start: Any = starts.get(module.ais_start, "prior")
    return estimate_log_likelihood(module.model, x, settings, start)


@FEW_CHAINS
@pytest.mark.parametrize("start", ["prior", "encoder", "coordinates", "fitted"])
def test_testing_estimates_the_log_likelihood_by_ais(
    build_dglm: BuildDGLM, make_trainer: MakeTrainer, batches: MakeBatches, start: str
) -> None:
    module, reported = build_dglm("hmc in coordinates"), []
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


def settings_of(kind: str) -> dict[str, Any]:
    return SETTINGS | ({"jump_scale": 1.0} if "coordinates" in kind else {})


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
    network, encoder = GaussianNetwork(6, 3, (4,)), Encoder(6, 3, (4,))
    kernels: dict[str, Kernel | None] = {
        "vae": None,
        "hmc": hmc,
        "l2hmc": l2hmc,
        "hmc in coordinates": AmortizedPreconditioned(deepcopy(hmc), network, encoder),
        "l2hmc in coordinates": AmortizedPreconditioned(
            deepcopy(l2hmc), deepcopy(network), encoder
        ),
    }
    for kind, kernel in kernels.items():
        decoder = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Softplus(), nn.Linear(5, 6))
        model, path = GenerativeModel(decoder, 3), folder / f"{kind}.ckpt"
        module = DGLM(model, Encoder(6, 3, (4,)), kernel, **settings_of(kind))
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
    assert settings == settings_of(kind)
    assert state.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(samples, module.posterior_samples(x, generator=seeded_generator("cpu", 5)))
    assert any("mask" in name for name in state) == kind.startswith("l2hmc")
    assert json.dumps(torch.load(path, weights_only=True)["hyper_parameters"])
    changed = DGLM.load_from_checkpoint(path, num_mh_steps=8, weights_only=True)
    again = pickle.loads(pickle.dumps(changed))
    found, wanted = (m.posterior_samples(x, None, torch.Generator()) for m in (again, changed))
    assert again.num_mh_steps == changed.num_mh_steps == 8
    assert torch.equal(found, wanted)
