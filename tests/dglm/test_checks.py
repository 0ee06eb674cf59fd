"""Networks that are no function of their rows, that do not fit, or that have changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dglm import DGLM, Encoder
from dglm.checks import check_fingerprint, check_function, check_sizes, fingerprint
from samplers import HMC, L2HMC


class Noisy(nn.Module):
    """Noise of its own, not of a layer that anybody could know by name."""

    def forward(self, z: Tensor) -> Tensor:
        return z + 1e-3 * torch.randn_like(z)


class BatchMean(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z - z.mean(dim=0)


class Shifted(nn.Module):
    """Each row looks at the one before."""

    def forward(self, z: Tensor) -> Tensor:
        return z + z.roll(1, dims=0)


class Attention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, dropout, batch_first=True)

    def forward(self, z: Tensor) -> Tensor:
        tokens = z.view(len(z), -1, 2)
        return self.attention(tokens, tokens, tokens)[0].flatten(1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (nn.Dropout, "something else each time"),
        (nn.RReLU, "something else each time"),
        (Noisy, "something else each time"),
        (lambda: Attention(0.5), "something else each time"),
        (lambda: nn.BatchNorm1d(4), "depends on the other rows"),
        (lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(), "depends on the other rows"),
        (BatchMean, "depends on the other rows"),
        (Shifted, "depends on the other rows"),
    ],
)
def test_what_is_no_function_of_a_row_is_found_by_calling(
    build: Callable[[], nn.Module], message: str
) -> None:
    network = build()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=rf"the decoder .*{message}.*call decoder\.eval\(\)"):
        check_function("decoder", network, torch.randn(3, 4))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "build",
    [nn.Dropout, lambda: nn.BatchNorm1d(4), lambda: Attention(0.5), lambda: Attention(0.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_a_row_pass(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    check_function("decoder", build().eval().to(dtype), torch.randn(3, 4, dtype=dtype))


def fitting() -> Encoder:
    return Encoder(6, 3, (4,))


def of_other_images() -> L2HMC:
    return L2HMC(3, 2, observation_dim=5, embedding_hidden=(4,))


@pytest.mark.parametrize(
    ("latent_dim", "encoder", "kernel", "message"),
    [
        (5, lambda: Encoder(6, 5, (4,)), None, "the decoder does not take 5 latent variables"),
        (3, lambda: Encoder(7, 3, (4,)), None, "encoder does not take observations of 6"),
        (3, lambda: Encoder(6, 2, (4,)), None, r"of 3 latent variables, .* returns \(2, 2\)"),
        (3, lambda: nn.Linear(6, 3), None, "mean and log standard deviation"),
        (3, fitting, lambda: L2HMC(4, 2), "L2HMC, does not take 3 latent"),
        (3, fitting, of_other_images, "the kernel, L2HMC, .* observations of 6 numbers"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    latent_dim: int, encoder: Any, kernel: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_sizes(nn.Linear(3, 6), latent_dim, encoder(), kernel and kernel())


@pytest.mark.parametrize("kernel", [lambda: None, lambda: HMC(2), lambda: L2HMC(3, 2)])
def test_sizes_that_fit_pass_and_nothing_is_left(kernel: Any) -> None:
    decoder = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))
    before = decoder[1].running_mean.clone()  # type: ignore[union-attr, operator]
    check_sizes(decoder, 3, Encoder(6, 3, (4,)), kernel())
    assert torch.equal(decoder[1].running_mean, before)  # type: ignore[arg-type]


def change_activation(dglm: DGLM) -> None:
    dglm.model.decoder.trunk[1] = nn.ReLU()  # type: ignore[operator, index, union-attr]


def change_encoder(dglm: DGLM) -> None:
    dglm.encoder.trunk[1].beta = 5.0  # type: ignore[union-attr, index]


def change_kernel(dglm: DGLM) -> None:
    dglm.kernel.mask.logical_not_()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("change", "name"),
    [(change_activation, "decoder"), (change_encoder, "encoder"), (change_kernel, "kernel")],
)
def test_another_function_is_told_from_the_same(
    build_dglm: Callable[..., DGLM], change: Callable[[DGLM], None], name: str
) -> None:
    dglm = build_dglm("l2hmc")
    before = fingerprint(*dglm.parts)
    check_fingerprint(before, fingerprint(*dglm.parts))
    check_fingerprint(before, fingerprint(*dglm.float().parts))
    dglm.double()
    change(dglm)
    with pytest.raises(ValueError, match=f"the {name} .* another function than the one that was"):
        check_fingerprint(before, fingerprint(*dglm.parts))


def test_fingerprints_leave_modes_alone_and_leave_random_parts_out() -> None:
    decoder = nn.Sequential(nn.Linear(3, 6), nn.Dropout(), nn.BatchNorm1d(6).eval())
    found = fingerprint(decoder, 3, nn.Sequential(Encoder(6, 3, (4,))), None)
    assert [module.training for module in decoder] == [True, True, False]
    assert found.keys() == {"decoder", "encoder"}
    assert fingerprint(Noisy(), 3, Encoder(3, 3, (4,)), None).keys() == {"encoder"}


def test_a_loaded_checkpoint_is_looked_at(build_dglm: Callable[..., DGLM]) -> None:
    dglm = build_dglm("hmc")
    checkpoint: dict[str, Any] = {"state_dict": dglm.state_dict()}
    dglm.on_save_checkpoint(checkpoint)
    build_dglm("hmc", learning_rate=0.1).on_load_checkpoint(checkpoint)
    changed = build_dglm("hmc")
    change_activation(changed)
    with pytest.raises(ValueError, match=r"the decoder .* another function"):
        changed.on_load_checkpoint(checkpoint)
    # Averages of weights, or others of one's own, are another function on purpose.
    others = {name: 2 * value for name, value in dglm.state_dict().items()}
    changed.on_load_checkpoint({**checkpoint, "state_dict": others})
