import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from dglm import DGLM, ReversibilityMonitor
from dglm.callbacks import EXACTNESS_BOUND, exactness_errors
from samplers import HMC, Endpoint, Energy, PhasePoint, seeded_generator

BuildDGLM = Callable[..., DGLM]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's own
]


@pytest.fixture(autouse=True)
def watch_every_second_update(monkeypatch: pytest.MonkeyPatch, double_precision: None) -> None:
    monkeypatch.setattr("dglm.callbacks._WATCH_EVERY", 2)
    torch.set_default_dtype(torch.float32)


class Batches:
    """A data loader of four batches of sixteen binary images."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.rand(4, 16, 6, generator=seeded_generator("cpu", 17)).round())

    def __len__(self) -> int:
        return 4


def fit(module: DGLM) -> dict[str, float]:
    """Train and return the errors that the last look has logged."""
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[ReversibilityMonitor()],
    )
    trainer.fit(module, Batches(), Batches())
    return {
        name: float(value) for name, value in trainer.callback_metrics.items() if "error" in name
    }


class Coarse(HMC):
    """Takes the position far away and back, where float32 forgets its last digits."""

    def integrate(self, start: PhasePoint, energy: Energy, context: object = None) -> Endpoint:
        state, momentum, log_det = super().integrate(start, energy, context)
        far = 2.0**20
        state = state._replace(position=state.position + far - far)
        return Endpoint(state, momentum, log_det + far - far)


def with_coarse_kernel(build_dglm: BuildDGLM) -> DGLM:
    module = build_dglm("hmc")
    return DGLM(module.model, module.encoder, Coarse(2, 0.4), 3)


@pytest.mark.parametrize("kind", ["hmc", "l2hmc"])
def test_a_sound_kernel_is_measured_in_silence(build_dglm: BuildDGLM, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        errors = fit(build_dglm(kind))
    assert errors.keys() == {"train/round_trip_error", "train/log_det_error"}
    assert 1e-8 < errors["train/round_trip_error"] < EXACTNESS_BOUND / 10
    assert (errors["train/log_det_error"] > 0) == (kind == "l2hmc")
    assert errors["train/log_det_error"] < EXACTNESS_BOUND / 10


def test_a_vae_has_nothing_to_measure(build_dglm: BuildDGLM) -> None:
    assert fit(build_dglm("vae")) == {}


def test_a_kernel_beyond_the_bound_is_warned_about_once(build_dglm: BuildDGLM) -> None:
    module = with_coarse_kernel(build_dglm)
    with pytest.warns(UserWarning, match=r"rounding keeps the kernel.*64-true") as caught:
        errors = fit(module)
    assert sum("rounding" in str(warning.message) for warning in caught) == 1
    assert max(errors.values()) > EXACTNESS_BOUND


def test_a_round_trip_without_a_number_is_beyond_the_bound(
    build_dglm: BuildDGLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = torch.tensor([torch.nan, 0.0])
    monkeypatch.setattr("dglm.callbacks.exactness_errors", lambda *arguments: missed)
    with pytest.warns(UserWarning, match="rounding keeps the kernel"):
        fit(build_dglm("hmc"))


def test_double_precision_makes_it_exact_again(build_dglm: BuildDGLM) -> None:
    x, errors = next(iter(Batches())), []
    for dtype in (torch.float32, torch.float64):
        module = with_coarse_kernel(build_dglm)
        module.trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        errors.append(exactness_errors(module.to(dtype), x.to(dtype), 0).max())
    assert errors[1] < 1e-6 * errors[0]
