"""Files that are whole or not there, and modules as plain data that such files can hold."""

import inspect
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Description = dict[str, Any]
"""{"class_path": "package.module.Class", "init_args": {...}}, jsonargparse's format."""

_PLACEMENT = ("device", "dtype")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def save_whole(content: object, path: Path) -> None:
    """Write plain data and tensors into a file; until all is on the disk, the former one stays."""
    write_beside(content, path).replace(path)


def write_beside(content: object, path: Path) -> Path:
    """Write what is to replace a file down to the disk, beside it, and return where."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def write_whole(text: str, path: Path) -> None:
    """Write text into a file; until all is written, the former one stays."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


class ResumeError(ValueError):
    """What an interrupted run has left cannot be gone on from: damaged, or of another run."""


class Resumable:
    """The file from which an interrupted run goes on: written whole, taken by its own run alone.

    Arguments:
        path: The file; None keeps nothing.
        identity: Tells one run from another: nested dictionaries and lists of plain data and
            tensors. Numbers in tensors may differ by rounding.
    """

    def __init__(self, path: Path | str | None, identity: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.identity = identity

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, on the CPU; None where nothing was.

        Raises:
            ResumeError: The file is damaged or of another run.
        """
        if self.path is None or not self.path.exists():
            return None
        content = load_plain(self.path)
        for name, before, now in differences(content.pop("identity", {}), self.identity):
            was = f"{name} was {before}, is now {now}"
            if isinstance(before, Tensor) or isinstance(now, Tensor):
                was = f"another {name}"
            raise ResumeError(
                f"{self.path} is of another run ({was}): remove it, or choose another place"
            )
        return content

    def save(self, content: dict[str, Any]) -> None:
        """Write all that the rest of the run depends on."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_whole({"identity": self.identity, **content}, self.path)


def load_plain(path: Path) -> dict[str, Any]:
    """Return what :func:`save_whole` wrote, on the CPU; nothing in the file is executed.

    Raises:
        ResumeError: The file is damaged or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise _unreadable(path, str(error).strip().split("\n")[0]) from error
    if not isinstance(content, dict):
        raise _unreadable(path, f"it holds a {type(content).__name__}")
    return content


def _unreadable(path: Path, reason: str) -> ResumeError:
    return ResumeError(f"{path} cannot be gone on from ({reason}): remove it to start again")


def differences(before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the path in nested dictionaries and lists where leaves differ, and both leaves.

    Tensors of floating point differ where their numbers do by more than rounding.
    """
    first, second = dict(_leaves(before)), dict(_leaves(now))
    for name in first | second:
        one, other = first.get(name), second.get(name)
        if not _same(one, other):
            yield name, one, other


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    tolerance = 1e-4 if one.is_floating_point() else 0
    one, other = one.cpu(), other.cpu()
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def checked_description(module: nn.Module) -> Description:
    """Return the description of a module, once :func:`rebuilt` has built another one from it."""
    return rebuilt(module)[0]


def rebuilt(module: nn.Module) -> tuple[Description, nn.Module]:
    """Return the description of a module, and what is built from it, on the module's own weights.

    Raises:
        TypeError: The description says less than it must, or what it says cannot be built.
    """
    description = describe(module)
    where = f"{description['class_path']} cannot be rebuilt from a checkpoint"
    try:
        with torch.random.fork_rng(devices=[]):
            again = build(description)
    except Exception as error:
        raise TypeError(f"{where}: {' '.join(str(error).split())}") from error
    state = module.state_dict()
    own, found = (
        {name: tuple(value.shape) for name, value in each.items()}
        for each in (state, again.state_dict())
    )
    for name in own | found:
        if own.get(name) != found.get(name):
            raise TypeError(
                f"{where}: {name} has shape {own.get(name)}, but that of its constructor's "
                f"arguments has {found.get(name)}"
            )
    again.load_state_dict(state, assign=True)
    return description, again


def describe(module: nn.Module) -> Description:
    """Return the class and constructor arguments of a module.

    A module must keep each constructor argument as an attribute of the same name, scikit-learn's
    convention, which torch.nn follows. Weights are not part of it: they are in the state_dict.

    Raises:
        TypeError: An argument is not kept, or is none of number, string, tensor,
            sequence, mapping and module.
    """
    kind = type(module)
    class_path = f"{kind.__module__}.{kind.__qualname__}"
    if hasattr(module, "parametrizations"):
        raise TypeError(f"a checkpoint cannot hold parametrizations: remove those of {class_path}")
    if _find(class_path) is not kind:
        raise TypeError(
            f"{class_path} cannot be rebuilt from a checkpoint: define it at the top of a module"
        )
    if kind in _CONTAINERS:
        return {"class_path": class_path, "init_args": _layers(module)}
    arguments: dict[str, Any] = {}
    if kind.__init__ in (nn.Module.__init__, nn.Identity.__init__):
        return {"class_path": class_path, "init_args": arguments}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name == "self" or name in _PLACEMENT:
            continue
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variable or not hasattr(module, name):
            raise TypeError(
                f"{class_path} cannot be rebuilt from a checkpoint: "
                + (
                    f"its constructor takes any {name}"
                    if variable
                    else f"keep its constructor argument {name!r} as self.{name}"
                )
            )
        value = getattr(module, name)
        if isinstance(parameter.default, bool) and not isinstance(value, bool):
            value = value is not None  # torch.nn keeps bias=True as the bias itself
        arguments[name] = _plain(value, f"{class_path}({name}=…)")
    return {"class_path": class_path, "init_args": arguments}


def build(module: nn.Module | Description) -> nn.Module:
    """Return the module that a description stands for; a module is returned as it is.

    Raises:
        TypeError: The description names something else than a subclass of nn.Module.
    """
    if isinstance(module, nn.Module):
        return module
    kind = _find(module["class_path"])
    if kind is None:
        raise TypeError(
            f"there is no {module['class_path']} here: have it defined where it was when the "
            "checkpoint was saved"
        )
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"{module['class_path']} is not a subclass of torch.nn.Module")
    arguments = module["init_args"]
    if isinstance(arguments, list):
        layers = OrderedDict((name, build(layer)) for name, layer in arguments)
        return nn.ModuleList(layers.values()) if kind is nn.ModuleList else kind(layers)
    return kind(**{key: _restored(value) for key, value in arguments.items()})


def _layers(container: nn.Module) -> list[list[Any]]:
    """Return names and descriptions; a layer may come several times if it has no weights."""
    # Not named_children, which leaves a layer out when it comes again.
    children = {name: child for name, child in container._modules.items() if child is not None}
    for name, child in children.items():
        if list(children.values()).count(child) > 1 and any(True for _ in child.parameters()):
            raise TypeError(
                f"layer {name} comes twice with the same weights, which a checkpoint would not tie"
            )
    return [[name, describe(child)] for name, child in children.items()]


def _find(class_path: str) -> object:
    path, _, name = class_path.rpartition(".")
    try:
        return getattr(import_module(path), name, None)
    except (ImportError, ValueError):
        return None


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, nn.Module):
        return describe(value)
    if isinstance(value, Tensor):
        return value.item() if value.dim() == 0 else value.detach().cpu()
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, where) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold")


def _restored(value: Any) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        return build(value)
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(map(_restored, value))
    return value
