from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from dglm import DGLM, Encoder, GenerativeModel
from dglm.callbacks import PATIENCE, TrainingFailed
from samplers import HMC, L2HMC, Kernel, seeded_generator

BuildDGLM = Callable[..., DGLM]

KINDS = ["vae", "hmc", "l2hmc"]


class Batches:
    """A data loader of batches of eight binary images."""

    def __init__(self, count: int) -> None:
        self.images = torch.rand(count, 8, 6, generator=seeded_generator("cpu", 17)).round()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.images.unbind())

    def __len__(self) -> int:
        return len(self.images)


class Recorder(Callback):
    """Keeps weights, optimizer state and step sizes after each batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.divergences: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: object) -> None:
        state = dict(module.named_parameters())
        for index, moments in enumerate(trainer.optimizers[0].state.values()):
            state |= {f"{index}.{name}": value for name, value in moments.items()}
        self.states.append({name: value.detach().clone() for name, value in state.items()})
        self.divergences.append(float(trainer.callback_metrics.get("train/divergence", 0)))

    def changed(self, index: int) -> set[bool]:
        """Return whether the numbers changed from batch ``index - 1`` to batch ``index``."""
        before, after = self.states[index - 1], self.states[index]
        return {not torch.equal(value, after[name]) for name, value in before.items()}


def fit(
    module: DGLM,
    steps: int,
    recorder: Recorder | None = None,
    checkpoint: Path | None = None,
    **options: Any,
) -> Recorder:
    recorder = recorder or Recorder()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[recorder],
        **options,
    )
    trainer.fit(module, Batches(4), Batches(1), ckpt_path=checkpoint, weights_only=True)
    return recorder


Break = Callable[[DGLM, Tensor], Tensor]


def break_one_gradient(number: float) -> Break:
    def spoil(module: DGLM, loss: Tensor) -> Tensor:
        parameter = module.get_parameter("encoder.mean.bias")

        def hook(gradient: Tensor) -> Tensor:
            handle.remove()
            return torch.cat([gradient[:-1], gradient.new_tensor([number])])

        handle = parameter.register_hook(hook)
        return loss

    return spoil


FAULTS: dict[str, Break] = {
    "loss NaN": lambda module, loss: loss * torch.nan,
    "loss inf": lambda module, loss: loss * torch.inf,
    "loss alone": lambda module, loss: loss + torch.inf,
    "gradient NaN": break_one_gradient(torch.nan),
    "gradient inf": break_one_gradient(torch.inf),
}


@pytest.fixture
def break_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Plant a fault in chosen calls of the training step."""

    def plant(fault: Break, *calls: int) -> None:
        step, counter = DGLM.training_step, iter(range(1000))

        def faulty(self: DGLM, x: Tensor, index: int) -> Tensor:
            loss = step(self, x, index)
            return fault(self, loss) if next(counter) in calls else loss

        monkeypatch.setattr(DGLM, "training_step", faulty)

    return plant


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_skipped_update_changes_neither_weights_nor_moments(
    build_dglm: BuildDGLM, break_at: Callable[..., None], fault: Break, kind: str
) -> None:
    module = build_dglm(kind)
    break_at(fault, 2, 3)
    recorder = fit(module, 6)
    for index in (2, 3):
        assert recorder.changed(index) == {False}
    for index in (1, 4, 5):
        assert recorder.changed(index) == {True}
    assert (module.safeguard.updates, module.safeguard.skipped) == (6, 2)
    for state in recorder.states:
        assert all(value.isfinite().all() for value in state.values())


def test_a_fault_in_one_of_the_accumulated_batches_skips_the_update(
    build_dglm: BuildDGLM, break_at: Callable[..., None]
) -> None:
    break_at(FAULTS["loss alone"], 2)
    module = build_dglm("vae")
    recorder = fit(module, 3, accumulate_grad_batches=2)
    assert recorder.changed(3) == {False}
    assert recorder.changed(5) == {True}
    assert (module.safeguard.updates, module.safeguard.skipped) == (3, 1)


def test_an_optimizer_that_skips_nothing_is_plain_adam(build_dglm: BuildDGLM) -> None:
    module, plain = build_dglm("vae"), build_dglm("vae")
    plain.configure_optimizers = lambda: torch.optim.Adam(plain.parameters(), 1e-3)  # type: ignore[method-assign]
    plain.configure_callbacks = lambda: []  # type: ignore[method-assign]
    fit(module, 3)
    fit(plain, 3)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


def test_ten_skipped_updates_in_a_row_end_the_run(
    build_dglm: BuildDGLM, break_at: Callable[..., None]
) -> None:
    before = fit(build_dglm("hmc"), 3).states[-1]
    module = build_dglm("hmc")
    break_at(FAULTS["loss NaN"], *range(3, 3 + PATIENCE))
    with pytest.raises(TrainingFailed, match="not finite in 17 updates in a row"):
        fit(module, 30)
    # The first look after the tenth is at 20; until then nothing is updated any more.
    assert (module.safeguard.updates, module.safeguard.skipped) == (20, 17)
    for name, value in module.named_parameters():
        assert torch.equal(value, before[name])


def test_nine_skipped_updates_in_a_row_do_not(
    build_dglm: BuildDGLM, break_at: Callable[..., None]
) -> None:
    module = build_dglm("hmc")
    break_at(FAULTS["loss NaN"], *(set(range(30)) - {9, 19, 29}))
    fit(module, 30)
    assert module.safeguard.skipped == 27


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_of_nan_ends_the_run_with_all_else_as_it_was(kind: str) -> None:
    kernels: dict[str, Kernel | None] = {"vae": None, "hmc": HMC(2), "l2hmc": L2HMC(3, 2)}
    decoder = nn.Sequential(nn.Linear(3, 6), Broken())
    module = DGLM(GenerativeModel(decoder, 3), Encoder(6, 3, (4,)), kernels[kind], 2)
    before = deepcopy(dict(module.named_parameters()))
    with pytest.raises(TrainingFailed):
        fit(module, 20)
    for name, value in module.named_parameters():
        assert torch.equal(value, before[name])
    assert module.safeguard.divergence == (kind != "vae")


@pytest.mark.parametrize("kind", KINDS)
def test_an_absurd_learning_rate_leaves_finite_weights(build_dglm: BuildDGLM, kind: str) -> None:
    module = build_dglm(kind, learning_rate=1e3)
    with pytest.raises(TrainingFailed):
        fit(module, 150)
    assert module.safeguard.skipped >= PATIENCE
    assert all(value.isfinite().all() for value in module.state_dict().values())


def steep(module: DGLM) -> None:
    """Let the energy explode away from the origin."""
    with torch.no_grad():
        module.model.decoder.output.weight.mul_(1e6)  # type: ignore[union-attr, operator]


def plain(module: DGLM) -> None:
    """Leave the energy as it is."""


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own
@pytest.mark.parametrize("kind", ["hmc", "l2hmc"])
@pytest.mark.parametrize(("change", "step_size"), [(steep, 0.4), (plain, 10.0)])
def test_divergences_are_counted_and_warned_about(
    build_dglm: BuildDGLM,
    kind: str,
    change: Callable[[DGLM], None],
    step_size: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dglm.callbacks._WARN_FROM", 20)
    module = build_dglm(kind, step_size=step_size)
    change(module)
    with pytest.warns(UserWarning, match=r"transitions diverged.*smaller step size") as caught:
        recorder = fit(module, 40)
    assert sum("diverged" in str(warning.message) for warning in caught) == 1
    expected = sum(recorder.divergences) / 40
    assert expected > 0.01
    assert module.safeguard.divergence == pytest.approx(expected)
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_a_sound_run_counts_nothing_and_is_silent(
    build_dglm: BuildDGLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dglm.callbacks._WARN_FROM", 1)
    module = build_dglm("l2hmc")
    fit(module, 11)
    counts = module.safeguard
    assert (counts.updates, counts.skipped, counts.divergence) == (11, 0, 0.0)


def test_counts_survive_a_checkpoint(
    build_dglm: BuildDGLM, break_at: Callable[..., None], tmp_path: Path
) -> None:
    break_at(FAULTS["gradient NaN"], 1, 5)
    first, second, path = build_dglm("hmc", step_size=10.0), build_dglm("hmc"), tmp_path / "c.ckpt"
    recorder = fit(first, 4)
    first.trainer.save_checkpoint(path)
    assert (first.safeguard.updates, first.safeguard.skipped) == (4, 1)
    fit(second, 7, recorder, path)
    assert (second.safeguard.updates, second.safeguard.skipped) == (7, 2)
    expected = sum(recorder.divergences) / 7
    assert expected > 0
    assert second.safeguard.divergence == pytest.approx(expected)


def test_the_host_waits_for_no_update() -> None:
    trainer, module = (
        Trainer(logger=False, accelerator="cpu"),
        DGLM(GenerativeModel(nn.Linear(2, 6), 2), Encoder(6, 2, (4,))),
    )
    module.to("meta")  # where a number cannot be asked for
    optimizer = module.configure_optimizers()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    guard = module.safeguard
    guard.on_train_start(trainer, module)
    guard.note_divergence(torch.zeros(8, device="meta"))
    guard.on_before_backward(trainer, module, torch.zeros((), device="meta"))
    guard.on_before_optimizer_step(trainer, module, optimizer)
    assert optimizer.found_inf.device.type == "meta"  # type: ignore[attr-defined]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        guard.state_dict()
