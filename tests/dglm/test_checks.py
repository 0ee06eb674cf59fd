"""Networks that are no function of their rows, that do not fit, or that have changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dglm import DGLM, Bernoulli, Encoder, Gaussian, GenerativeModel
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
    model = GenerativeModel(nn.Linear(3, 6), latent_dim)
    with pytest.raises(ValueError, match=message):
        check_sizes((model, encoder(), kernel and kernel()))


@pytest.mark.parametrize("kernel", [lambda: None, lambda: HMC(2), lambda: L2HMC(3, 2)])
def test_sizes_that_fit_pass_and_nothing_is_left(kernel: Any) -> None:
    decoder = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))
    before = decoder[1].running_mean.clone()  # type: ignore[union-attr, operator]
    check_sizes((GenerativeModel(decoder, 3), fitting(), kernel()))
    assert torch.equal(decoder[1].running_mean, before)  # type: ignore[arg-type]


def change_activation(dglm: DGLM) -> None:
    dglm.model.decoder.trunk[1] = nn.ReLU()  # type: ignore[operator, index, union-attr]


def change_encoder(dglm: DGLM) -> None:
    dglm.encoder.trunk[1].beta = 5.0  # type: ignore[union-attr, index]


def change_likelihood(dglm: DGLM) -> None:
    dglm.model.likelihood = Gaussian(0.9)


def change_kernel(dglm: DGLM) -> None:
    dglm.kernel.mask.logical_not_()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_activation, "decoder"),
        (change_encoder, "encoder"),
        (change_likelihood, "likelihood"),
        (change_kernel, "kernel"),
    ],
)
def test_another_function_is_told_from_the_same(
    build_dglm: Callable[..., DGLM], change: Callable[[DGLM], None], name: str
) -> None:
    dglm = build_dglm("l2hmc")
    before = fingerprint(dglm.parts)
    check_fingerprint(before, fingerprint(dglm.parts))
    check_fingerprint(before, fingerprint(dglm.float().parts))
    dglm.double()
    change(dglm)
    with pytest.raises(ValueError, match=f"the {name} .* another function than the one that was"):
        check_fingerprint(before, fingerprint(dglm.parts))


def test_fingerprints_leave_modes_alone_and_leave_random_parts_out() -> None:
    decoder = nn.Sequential(nn.Linear(3, 6), nn.Dropout(), nn.BatchNorm1d(6).eval())
    found = fingerprint((GenerativeModel(decoder, 3), nn.Sequential(fitting()), None))
    assert [module.training for module in decoder] == [True, True, False]
    assert found.keys() == {"decoder", "encoder", "likelihood"}
    noisy = GenerativeModel(nn.Sequential(nn.Linear(3, 6), Noisy()), 3)
    assert "decoder" not in fingerprint((noisy, fitting(), None))


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


class Masked(nn.Linear):
    """Draws, in its constructor, what no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__(3, 6)
        self.mask = torch.rand(6)

    def forward(self, z: Tensor) -> Tensor:
        return self.mask * super().forward(z)


class Offset(Bernoulli):
    offset = 0.0

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        return super().log_prob(parameters, x) + self.offset


def hooked() -> nn.Module:
    decoder = nn.Linear(3, 6)
    decoder.register_forward_hook(lambda module, given, output: 2 * output)
    return decoder


def with_attribute() -> Offset:
    likelihood = Offset()
    likelihood.offset = 1.0
    return likelihood


@pytest.mark.parametrize(
    ("decoder", "likelihood", "name"),
    [
        (hooked, Bernoulli, "decoder"),
        (Masked, Bernoulli, "decoder"),
        (lambda: nn.Linear(3, 6), with_attribute, "likelihood"),
    ],
)
def test_what_a_checkpoint_would_rebuild_otherwise_is_refused_at_once(
    decoder: Callable[[], nn.Module], likelihood: Callable[[], Bernoulli], name: str
) -> None:
    with pytest.raises(ValueError, match=f"the {name} that a checkpoint rebuilds is another"):
        DGLM(GenerativeModel(decoder(), 3, likelihood()), fitting())


def longer_trajectories(dglm: DGLM) -> None:
    dglm.kernel.num_leapfrogs, dglm.kernel.jitter = 5, 0.4  # type: ignore[union-attr, assignment]


def others_for_all(dglm: DGLM) -> None:
    dglm.model, dglm.encoder = GenerativeModel(nn.Linear(3, 6), 3), Encoder(6, 3, (7, 2))
    dglm.kernel, dglm.num_mh_steps, dglm.learning_rate = L2HMC(3, 2), 7, 1e-5


@pytest.mark.parametrize("change", [lambda dglm: None, longer_trajectories, others_for_all])
def test_what_has_changed_since_it_was_built_is_loaded_as_it_was_saved(
    change: Callable[[DGLM], None], build_dglm: Callable[..., DGLM], fit: Any, tmp_path: Path
) -> None:
    saved = DGLM(GenerativeModel(nn.Linear(3, 6), 3, Gaussian(1.0)), fitting(), HMC(2))
    saved.model.likelihood.scale = 0.7
    change(saved)
    fit(saved, 1).save_checkpoint(tmp_path / "saved.ckpt")
    torch.set_default_dtype(torch.float32)  # not that of the weights, which is kept
    loaded = DGLM.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    torch.set_default_dtype(torch.float64)
    assert (loaded.num_mh_steps, loaded.learning_rate) == (saved.num_mh_steps, saved.learning_rate)
    x = torch.rand(20, 6)
    found, wanted = (
        each.posterior_samples(x, generator=torch.Generator().manual_seed(0))
        for each in (loaded, saved)
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(loaded.model.log_joint(x, wanted), saved.model.log_joint(x, wanted))


def test_a_checkpoint_that_will_not_load_is_warned_of_where_it_is_saved(
    build_dglm: Callable[..., DGLM], fit: Any, tmp_path: Path
) -> None:
    dglm = build_dglm("hmc")
    trainer = fit(dglm, 1)
    nn.utils.parametrizations.weight_norm(dglm.model.decoder.output)
    with pytest.warns(UserWarning, match=r"this checkpoint will not load: .*parametrizations"):
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
