"""Checks of networks by calling them: functions of each row alone, sizes that fit, fingerprints."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from dglm.precision import check_precision, full_precision
from samplers import Kernel
from samplers.io import Description, differences, rebuilt

if TYPE_CHECKING:
    from dglm.model import GenerativeModel

Parts = tuple["GenerativeModel", nn.Module, Kernel | None]
"""A model, its encoder and its kernel."""

Fingerprint = dict[str, list[Tensor]]
"""What each part of a model returns for inputs that never change."""

_ROUNDING = 1e-4
"""Relative to the largest output: other batch sizes, devices and compilers round otherwise."""
_OTHER_DEVICES = 1e-3

Result = TypeVar("Result")


@torch.no_grad()
def check_function(name: str, network: nn.Module, rows: Tensor) -> list[Tensor]:
    """Return a network's outputs for some rows, if they are a function of each row alone.

    It is called again, on the rows in another order, and on one of them: dropout of any make, noise
    and batch statistics show in what it returns. Its buffers stay as they are.

    Raises:
        ValueError: The outputs differ by more than rounding.
    """
    order = torch.arange(len(rows), device=rows.device).flip(0)
    with _buffers_kept(network):
        first, again, backward = (_outputs(network(given)) for given in (rows, rows, rows[order]))
        try:
            alone = _outputs(network(rows[:1]))
        except (RuntimeError, ValueError):  # batch statistics of a single row
            alone = []
    cure = f"call {name}.eval(), or take out what is random or looks at the whole batch"
    if not _same(first, again):
        raise ValueError(f"the {name} returns something else each time it is called: {cure}")
    mirrored = [part[order] if len(part) == len(rows) else part for part in backward]
    if not (_same(first, mirrored) and _same([part[:1] for part in first], alone)):
        raise ValueError(f"what the {name} returns for a row depends on the other rows: {cure}")
    return first


def check_trainer(trainer: Trainer) -> None:
    """Raise ValueError where a Trainer's precision is too low, or it would clip all gradients."""
    check_precision(trainer.precision)
    if trainer.gradient_clip_val:
        raise ValueError(
            "gradient_clip_val would be ignored: the sampler's gradient is clipped to the paper's "
            "norm, those of encoder and decoder are not; leave it out"
        )


def warn_of_compiled_steps(module: LightningModule) -> None:
    """Warn where ``torch.compile`` was asked to compile the steps as a whole, which it does not."""
    if getattr(module, "_compiler_ctx", None) is not None:
        warnings.warn(
            "the steps of a DGLM are not compiled as a whole: compile its chain, by "
            "dglm.kernel.compile(), and pass the DGLM itself",
            stacklevel=3,
        )


@torch.no_grad()
def check_sizes(parts: Parts) -> None:
    """Raise ValueError where decoder, encoder and kernel are of sizes that do not fit together."""
    model, encoder, kernel = parts
    decoder, latent_dim = model.decoder, model.latent_dim
    like = next(decoder.parameters(), next(encoder.parameters(), torch.empty(0)))
    z = like.new_zeros(2, latent_dim)
    with _buffers_kept(decoder), _buffers_kept(encoder):
        x = _fitting(lambda: decoder(z), f"the decoder does not take {latent_dim} latent variables")
        if x.dim() != 2:
            raise ValueError(
                f"the decoder must return flat (B, N), but it returns {tuple(x.shape)} for B = 2; "
                "put torch.nn.Flatten() behind it"
            )
        sizes = f"observations of {x[0].numel()} numbers, which the decoder returns"
        q = _fitting(lambda: _outputs(encoder(x)), f"the encoder does not take {sizes}")
    check_posterior(q, len(x), latent_dim)
    if kernel is not None:
        name = type(kernel).__name__
        _fitting(
            lambda: _moved(kernel, x, z),
            f"the kernel, {name}, does not take {latent_dim} latent variables and {sizes}",
        )


def check_posterior(outputs: list[Tensor], count: int, latent_dim: int) -> None:
    """Raise ValueError where an encoder's outputs for some observations are no Gaussians of z."""
    if len(outputs) != 2 or any(part.shape != (count, latent_dim) for part in outputs):
        raise ValueError(
            f"the encoder must return mean and log standard deviation of {latent_dim} latent "
            f"variables, as the decoder takes, but it returns {_shapes(outputs)} for {count} "
            "observations"
        )


def check_factors(outputs: Sequence[Tensor], latent_dim: int) -> None:
    """Raise ValueError where a network's outputs are no means and Cholesky factors."""
    shapes = [tuple(part.shape[1:]) for part in outputs]
    if shapes != [(latent_dim,), (latent_dim, latent_dim)]:
        raise ValueError(
            f"the network of RefinedStart must return μ ({latent_dim},) and L ({latent_dim}, "
            f"{latent_dim}) of each image, but it returns {shapes}"
        )
    factor = outputs[1]
    triangular = torch.equal(factor, factor.tril())
    positive = bool((factor.diagonal(dim1=1, dim2=2) > 0).all())
    if not (triangular and positive and all(bool(part.isfinite().all()) for part in outputs)):
        raise ValueError(
            "the factors L of RefinedStart's network must be finite and lower triangular, with a "
            "positive diagonal"
        )


@full_precision()
@torch.no_grad()
def fingerprint(parts: Parts) -> Fingerprint:
    """Return what the parts of a model, in evaluation mode, return for inputs that never change.

    A part that returns something else each time it is called, or cannot be called, has none.
    """
    model, encoder, kernel = parts
    decoder, latent_dim = model.decoder, model.latent_dim
    found: Fingerprint = {}
    with evaluation_mode(*parts):
        like = next(model.parameters(), next(encoder.parameters(), torch.empty(0)))
        z = torch.linspace(-2, 2, 3 * latent_dim).cos().mul(2).view(3, latent_dim).to(like)

        def keep(name: str, call: Callable[[], object]) -> None:
            with suppress(RuntimeError, ValueError, TypeError, IndexError):
                first, again = (_outputs(call()) for _ in range(2))
                if _same(first, again):
                    found[name] = [part.float().cpu() for part in first]

        keep("decoder", lambda: decoder(z))
        width = next((part[0].numel() for part in found.get("decoder", [])), 0)
        x = torch.linspace(0, 9, 3 * width).cos().square().view(3, width).to(like)
        keep("encoder", lambda: encoder(x))
        keep("likelihood", lambda: model.likelihood.log_prob(2 - x, x))
        if kernel is not None:
            keep("kernel", lambda: _moved(kernel, x, z))
    return found


def checked_descriptions(parts: Parts) -> dict[str, Description | None]:
    """Return what model, encoder and kernel are rebuilt from, by these names.

    Raises:
        TypeError: A part cannot be described.
        ValueError: What is rebuilt from a description is another function.
    """
    found = [(None, None) if part is None else rebuilt(part) for part in parts]
    descriptions, again = zip(*found, strict=True)
    check_fingerprint(fingerprint(parts), fingerprint(again))
    return dict(zip(("model", "encoder", "kernel"), descriptions, strict=True))


def present_descriptions(parts: Parts, former: Mapping[str, Any]) -> dict[str, Any]:
    """Return the descriptions of the parts, the former ones where only step sizes have changed.

    Those move in training, and the weights hold them.
    """
    found = checked_descriptions(parts)
    changed = {
        name: any(not path.endswith("step_size") for path, *_ in differences(former[name], each))
        for name, each in found.items()
    }
    return {name: found[name] if changed[name] else former[name] for name in found}


def kept_fingerprint(parts: Parts, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return what a checkpoint keeps: the fingerprint, and a hash of the weights that it is of."""
    return {"weights": _digest(weights), "outputs": fingerprint(parts)}


def check_kept_fingerprint(
    kept: Mapping[str, Any], parts: Parts, weights: dict[str, Tensor]
) -> None:
    """Raise ValueError where the same weights make another function than when they were saved."""
    if kept["weights"] == _digest(weights):
        check_fingerprint(kept["outputs"], fingerprint(parts))


def check_fingerprint(expected: Fingerprint, found: Fingerprint) -> None:
    """Raise ValueError that names the first part that is another function than it was."""
    for name, outputs in expected.items():
        if name in found and not _same(outputs, found[name], _OTHER_DEVICES):
            raise ValueError(
                f"the {name} that a checkpoint rebuilds is another function than the one that was "
                "saved: an activation, an attribute, a hook or its code differs from what its "
                "constructor makes; make what differs an argument of that"
            )


def _digest(weights: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _moved(kernel: Kernel, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a trajectory in N(0, I) leads, and its momentum."""
    ones = torch.ones_like(z[:, 0])
    end, momentum, _ = kernel.trajectory(
        z, 0.5 - z, ones, lambda point: 0.5 * point.square().sum(dim=1), kernel.embed(x)
    )
    return end, momentum


def _fitting(call: Callable[[], Result], otherwise: str) -> Result:
    try:
        return call()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{otherwise}: {' '.join(str(error).split())}") from error


def _outputs(output: object) -> list[Tensor]:
    parts = output if isinstance(output, (tuple, list)) else (output,)
    return [part for part in parts if isinstance(part, Tensor)]


def _shapes(parts: list[Tensor]) -> str:
    return " and ".join(str(tuple(part.shape)) for part in parts)


def _same(one: list[Tensor], other: list[Tensor], tolerance: float = _ROUNDING) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape
        and torch.allclose(a, b, rtol=0, atol=tolerance * _scale(a), equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def _scale(output: Tensor) -> float:
    return float(output.abs().nan_to_num(0.0, 0.0, 0.0).max()) if output.numel() else 0.0


@contextmanager
def _buffers_kept(network: nn.Module) -> Iterator[None]:
    """Put back what calls in training mode do to batch statistics."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


@contextmanager
def evaluation_mode(*parts: nn.Module | None) -> Iterator[None]:
    """Put modules into evaluation mode, and each back into its own."""
    modules = [module for part in parts if part is not None for module in part.modules()]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
