"""Chains and importance weights keep their precision in a Trainer of lower precision."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from dglm import (
    DGLM,
    AISSettings,
    bidirectional_bounds,
    estimate_log_likelihood,
    inpaint,
    long_chains,
    principal_axes,
)
from dglm.chain import Chain, long_chain_log_joint, run_chain
from dglm.model import NegativeLogLikelihood
from dglm.precision import full_precision
from samplers import HMC, State, seeded_generator

BuildDGLM = Callable[..., DGLM]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*precision.*training.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def single_precision(double_precision: None) -> None:
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["hmc", "l2hmc"])
@pytest.mark.parametrize(
    ("precision", "of_chains", "of_networks"),
    [
        ("32-true", torch.float32, torch.float32),
        ("64-true", torch.float64, torch.float64),
        ("bf16-mixed", torch.float32, torch.bfloat16),
    ],
)
def test_chains_of_training_and_validation(
    build_dglm: BuildDGLM,
    fit: Callable[..., Trainer],
    kind: str,
    precision: str,
    of_chains: torch.dtype,
    of_networks: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, chains, outputs = build_dglm(kind), [], []

    def recording(
        model: nn.Module, kernel: nn.Module, x: Tensor, *arguments: Any, **options: Any
    ) -> Chain:
        chain = run_chain(model, kernel, x, *arguments, **options)  # type: ignore[arg-type]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            chains.append((chain, module.model.log_joint(x, chain.state.position)))
        return chain

    def keep(encoder: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():
            outputs.append(output[0].dtype)

    monkeypatch.setattr("dglm.module.run_chain", recording)
    module.encoder.register_forward_hook(keep)
    fit(module, 2, precision=precision)
    assert set(outputs) == {of_networks}
    assert len(chains) == 3
    for chain, log_joint in chains:
        assert {part.dtype for part in (*chain.state[:3], chain.loss, chain.acceptance)} == {
            of_chains
        }
        torch.testing.assert_close(chain.log_joint[-1], log_joint, rtol=1e-6, atol=1e-5)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.filterwarnings("ignore:the log-likelihoods of")
@pytest.mark.parametrize("start", ["prior", "encoder", "coordinates", "fitted"])
def test_importance_weights_do_not_know_the_trainer_s_precision(
    build_dglm: BuildDGLM,
    make_trainer: Callable[..., Trainer],
    batches: Callable[[int], Iterable[Tensor]],
    start: str,
) -> None:
    results = []
    for precision in ("32-true", "bf16-mixed"):
        module = build_dglm("hmc in coordinates")
        module.ais, module.ais_start = AISSettings(3, 4, 2), start  # type: ignore[assignment]
        make_trainer(precision=precision, devices=1).test(module, batches(2), verbose=False)
        results.append(module.test_result.log_weights)
    assert results[0].dtype == torch.float64
    assert torch.equal(*results)


@pytest.fixture
def fast_products() -> Iterator[None]:
    """What a user may allow on a GPU with tensor cores, or on a processor with bfloat16."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.filterwarnings("ignore:the log-likelihoods of")
@pytest.mark.usefixtures("fast_products")
def test_chains_do_not_know_faster_products(
    build_dglm: BuildDGLM, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, allowed = build_dglm("hmc"), []
    value_and_gradient = NegativeLogLikelihood.value_and_gradient
    x, generator = images.float(), seeded_generator("cpu", 0)

    def recording(misfit: NegativeLogLikelihood, position: Tensor) -> State:
        allowed.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return value_and_gradient(misfit, position)

    monkeypatch.setattr(NegativeLogLikelihood, "value_and_gradient", recording)
    axes, start = principal_axes(HMC(), module.model.energy(x), torch.randn(7, 3), 4, generator)
    few = AISSettings(2, 2, 2)
    works = [
        lambda: module.posterior_samples(x),
        lambda: estimate_log_likelihood(module.model, x, few),
        lambda: bidirectional_bounds(module.model, 2, few),
        lambda: inpaint(module.model, x, torch.arange(6) < 3, 1, (HMC(), 1)),
        lambda: long_chains(HMC(), module.model.energy(x), start, 2, axes, generator),
        lambda: long_chain_log_joint(module.model, x, start, 2),
    ]
    for work in works:
        allowed.clear()
        work()
        assert set(allowed) == {("highest", False)}
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)


def newer_settings() -> set[tuple[str, str]]:
    """What torch's newer functions say."""
    backends: Any = torch.backends
    places = {
        "matmul": backends.cuda.matmul,
        "conv": backends.cudnn.conv,
        "rnn": backends.cudnn.rnn,
        "CPU's matmul": backends.mkldnn.matmul,
        "CPU's conv": backends.mkldnn.conv,
    }
    return {(name, place.fp32_precision) for name, place in places.items()}


# In a process of its own: what it allows, torch does not fully forget.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    "allow",
    [
        "pass",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
        "torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
        "torch.set_float32_matmul_precision('medium')",
    ],
)
def test_faster_products_allowed_in_either_way_are_left_out_and_put_back(allow: str) -> None:
    if (child := os.fork()) == 0:
        status = 1
        try:
            exec(allow)
            before = newer_settings()
            with full_precision():
                exact = {setting for _, setting in newer_settings()} == {"ieee"}
            status = 0 if exact and newer_settings() == before else 1
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
