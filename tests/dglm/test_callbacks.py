import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from dglm import DGLM, Encoder, GenerativeModel, ReversibilityMonitor
from dglm.callbacks import EXACTNESS_BOUND, PATIENCE, TrainingFailed, exactness_errors
from samplers import HMC, L2HMC, Endpoint, Energy, Kernel, PhasePoint

pytestmark = pytest.mark.filterwarnings("ignore:.* updates were skipped")

BuildDGLM = Callable[..., DGLM]

KINDS = ["vae", "hmc", "l2hmc"]


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


@pytest.fixture
def recorded(fit: Callable[..., Trainer]) -> Callable[..., Recorder]:
    """A function that trains in epochs of four batches and keeps what each of them leaves."""

    def recorded(
        module: DGLM, steps: int, recorder: Recorder | None = None, **options: Any
    ) -> Recorder:
        recorder = recorder or Recorder()
        fit(module, steps, recorder, epoch=4, **{"log_every_n_steps": 1, **options})
        return recorder

    return recorded


Recorded = Callable[..., Recorder]
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


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("vae", "loss NaN"), ("hmc", "gradient NaN"), *(("l2hmc", fault) for fault in FAULTS)],
)
def test_a_skipped_update_changes_neither_weights_nor_moments(
    build_dglm: BuildDGLM,
    recorded: Recorded,
    break_at: Callable[..., None],
    kind: str,
    fault: str,
) -> None:
    module = build_dglm(kind)
    break_at(FAULTS[fault], 2, 3)
    recorder = recorded(module, 6)
    for index in (2, 3):
        assert recorder.changed(index) == {False}
    for index in (1, 4, 5):
        assert recorder.changed(index) == {True}
    assert (module.safeguard.updates, module.safeguard.skipped) == (6, 2)
    for state in recorder.states:
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_updates_of_another_optimizer_are_skipped_too(
    build_dglm: BuildDGLM,
    recorded: Recorded,
    break_at: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
) -> None:
    def optimizer(module: DGLM) -> torch.optim.Optimizer:
        return kind(module.parameters(), lr=1e-3)

    monkeypatch.setattr(DGLM, "configure_optimizers", optimizer)
    break_at(FAULTS["gradient NaN"], 2)
    module = build_dglm("l2hmc")
    recorder = recorded(module, 4)
    assert [recorder.changed(index) for index in (1, 2, 3)] == [{True}, {False}, {True}]
    assert module.safeguard.skipped == 1


def test_a_fault_in_one_of_the_accumulated_batches_skips_the_update(
    build_dglm: BuildDGLM, recorded: Recorded, break_at: Callable[..., None]
) -> None:
    break_at(FAULTS["loss alone"], 2)
    module = build_dglm("vae")
    recorder = recorded(module, 3, accumulate_grad_batches=2)
    assert recorder.changed(3) == {False}
    assert recorder.changed(5) == {True}
    assert (module.safeguard.updates, module.safeguard.skipped) == (3, 1)


def test_a_sound_run_is_plain_adam_counts_nothing_and_is_silent(
    build_dglm: BuildDGLM, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dglm.callbacks._WARN_FROM", 1)
    monkeypatch.setattr("dglm.module._WARM_UP", 1)
    module, plain = build_dglm("vae"), build_dglm("vae")
    plain.configure_optimizers = lambda: torch.optim.Adam(plain.parameters(), 1e-3)  # type: ignore[method-assign]
    plain.configure_callbacks = lambda: []  # type: ignore[method-assign]
    recorded(module, 3)
    recorded(plain, 3)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)
    counts = module.safeguard
    assert (counts.updates, counts.skipped, counts.divergence) == (3, 0, 0.0)


def test_ten_skipped_updates_in_a_row_end_the_run(
    build_dglm: BuildDGLM, recorded: Recorded, break_at: Callable[..., None]
) -> None:
    before = recorded(build_dglm("hmc"), 3).states[-1]
    module = build_dglm("hmc")
    break_at(FAULTS["loss NaN"], *range(3, 3 + PATIENCE))
    with pytest.raises(TrainingFailed, match="not finite in 17 updates in a row"):
        recorded(module, 30)
    # The first look after the tenth is at 20; until then nothing is updated any more.
    assert (module.safeguard.updates, module.safeguard.skipped) == (20, 17)
    for name, value in module.named_parameters():
        assert torch.equal(value, before[name])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_nine_skipped_updates_in_a_row_do_not(
    build_dglm: BuildDGLM, recorded: Recorded, break_at: Callable[..., None]
) -> None:
    module = build_dglm("hmc")
    break_at(FAULTS["loss NaN"], *(set(range(30)) - {9, 19, 29}))
    with pytest.warns(UserWarning, match="27 of 30 updates were skipped"):
        recorded(module, 30)
    assert module.safeguard.skipped == 27


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_of_nan_ends_the_run_with_all_else_as_it_was(
    kind: str, recorded: Recorded
) -> None:
    kernels: dict[str, Kernel | None] = {"vae": None, "hmc": HMC(2), "l2hmc": L2HMC(3, 2)}
    decoder = nn.Sequential(nn.Linear(3, 6), Broken())
    module = DGLM(GenerativeModel(decoder, 3), Encoder(6, 3, (4,)), kernels[kind], 2)
    before = deepcopy(dict(module.named_parameters()))
    with pytest.raises(TrainingFailed):
        recorded(module, 20)
    for name, value in module.named_parameters():
        assert torch.equal(value, before[name])
    assert module.safeguard.divergence == (kind != "vae")


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
    recorded: Recorded,
    kind: str,
    change: Callable[[DGLM], None],
    step_size: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dglm.callbacks._WARN_FROM", 20)
    module = build_dglm(kind, step_size=step_size)
    change(module)
    with pytest.warns(UserWarning, match=r"transitions diverged.*smaller step size") as caught:
        recorder = recorded(module, 40)
    assert sum("diverged" in str(warning.message) for warning in caught) == 1
    expected = sum(recorder.divergences) / 40
    assert expected > 0.01
    assert module.safeguard.divergence == pytest.approx(expected)
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_divergences_of_the_first_updates_alone_are_counted_in_silence(
    build_dglm: BuildDGLM, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dglm.callbacks._WARN_FROM", 20)
    module = build_dglm("hmc")
    note = module.safeguard.note_divergence

    def only_at_first(diverging: Tensor) -> None:
        note(torch.full_like(diverging, module.global_step < 10))

    monkeypatch.setattr(module.safeguard, "note_divergence", only_at_first)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorded(module, 30)
    assert not [warning for warning in caught if "diverged" in str(warning.message)]
    assert module.safeguard.divergence == pytest.approx(1 / 3)


def test_counts_survive_a_checkpoint(
    build_dglm: BuildDGLM, recorded: Recorded, break_at: Callable[..., None], tmp_path: Path
) -> None:
    break_at(FAULTS["gradient NaN"], 1, 5)
    first, second, path = build_dglm("hmc", step_size=10.0), build_dglm("hmc"), tmp_path / "c.ckpt"
    recorder = recorded(first, 4)
    first.trainer.save_checkpoint(path)
    assert (first.safeguard.updates, first.safeguard.skipped) == (4, 1)
    recorded(second, 7, recorder, checkpoint=path)
    assert (second.safeguard.updates, second.safeguard.skipped) == (7, 2)
    expected = sum(recorder.divergences) / 7
    assert expected > 0
    assert second.safeguard.divergence == pytest.approx(expected)


def test_the_host_waits_for_no_update() -> None:
    trainer = Trainer(logger=False, accelerator="cpu")
    module = DGLM(GenerativeModel(nn.Linear(2, 6), 2), Encoder(6, 2, (4,)))
    module.to("meta")  # where a number cannot be asked for
    optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[index, call-overload]
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


# The exactness of the kernel


class Coarse(HMC):
    """Takes the position far away and back, where float32 forgets its last digits."""

    def integrate(self, start: PhasePoint, energy: Energy, context: object = None) -> Endpoint:
        state, momentum, log_det = super().integrate(start, energy, context)
        far = 2.0**20
        state = state._replace(position=state.position + far - far)
        return Endpoint(state, momentum, log_det + far - far)


def coarse(build_dglm: BuildDGLM) -> DGLM:
    module = build_dglm("hmc")
    return DGLM(module.model, module.encoder, Coarse(2, 0.4), 3)


@pytest.fixture
def watched(
    fit: Callable[..., Trainer], double_precision: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[DGLM], dict[str, float]]:
    """A function that trains in float32 and returns the errors that the last look has logged."""
    monkeypatch.setattr("dglm.callbacks._WATCH_EVERY", 2)
    torch.set_default_dtype(torch.float32)

    def watched(module: DGLM) -> dict[str, float]:
        metrics = fit(module, 4, ReversibilityMonitor()).callback_metrics
        return {name: float(value) for name, value in metrics.items() if "error" in name}

    return watched


Watched = Callable[[DGLM], dict[str, float]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_kernel_is_measured_in_silence(
    build_dglm: BuildDGLM, watched: Watched, kind: str
) -> None:
    errors = watched(build_dglm(kind))
    if kind == "vae":
        assert errors == {}
        return
    assert errors.keys() == {"train/round_trip_error", "train/log_det_error"}
    assert 1e-8 < errors["train/round_trip_error"] < EXACTNESS_BOUND / 10
    assert (errors["train/log_det_error"] > 0) == (kind == "l2hmc")
    assert errors["train/log_det_error"] < EXACTNESS_BOUND / 10


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own
def test_a_kernel_beyond_the_bound_is_warned_about_once(
    build_dglm: BuildDGLM, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match=r"rounding keeps the kernel.*64-true") as caught:
        errors = watched(coarse(build_dglm))
    assert sum("rounding" in str(warning.message) for warning in caught) == 1
    assert max(errors.values()) > EXACTNESS_BOUND
    missed = torch.tensor([torch.nan, 0.0])
    monkeypatch.setattr("dglm.callbacks.exactness_errors", lambda *arguments: missed)
    with pytest.warns(UserWarning, match="rounding keeps the kernel"):
        watched(build_dglm("hmc"))


def test_double_precision_makes_it_exact_again(
    build_dglm: BuildDGLM, make_trainer: Callable[..., Trainer], images: Tensor
) -> None:
    errors = []
    for dtype in (torch.float32, torch.float64):
        module = coarse(build_dglm)
        module.trainer = make_trainer()
        errors.append(exactness_errors(module.to(dtype), images.to(dtype), 0).max())
    assert errors[1] < 1e-6 * errors[0]
