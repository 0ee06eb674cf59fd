import inspect
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dglm import GenerativeModel
from dglm.coordinates import AmortizedPreconditioned, GaussianNetwork
from dglm.likelihoods import Bernoulli, Gaussian
from dglm.networks import ConvolutionalDecoder, ConvolutionalEncoder, Decoder, Encoder
from samplers import HMC, L2HMC, Preconditioned
from samplers.io import build, checked_description, describe

CONVOLUTIONAL = nn.Sequential(
    nn.Linear(3, 8, bias=False),
    nn.Unflatten(1, (2, 2, 2)),
    nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
    nn.Softplus(beta=2.0),
    nn.Sequential(nn.Conv2d(3, 1, (3, 3), padding="same", bias=False), nn.LayerNorm((1, 4, 4))),
    nn.Flatten(),
)


class Listed(nn.Module):
    def __init__(self, layers: nn.ModuleList | nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, z: Tensor) -> Tensor:
        layers = self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers
        return sum(layer(z) for layer in layers)


class Stack(nn.Sequential):
    """A Sequential with a constructor of its own, as torchvision's MLP is one."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(3, width), nn.Softplus())
        self.width = width


def two() -> list[nn.Linear]:
    return [nn.Linear(3, 4), nn.Linear(3, 4)]


SOFTPLUS = nn.Softplus()
FUNCTIONS: dict[str, tuple[nn.Module, int]] = {
    "Encoder": (Encoder(6, 3, (4, 5)), 6),
    "Decoder": (Decoder(3, 6, (4,), output_scale=0.5), 3),
    "ConvolutionalEncoder": (ConvolutionalEncoder((2, 8, 4), 3, (4, 5)), 64),
    "ConvolutionalDecoder": (ConvolutionalDecoder(3, (2, 8, 4), (5, 4)), 3),
    "linear": (nn.Linear(3, 6, bias=False), 3),
    "convolutional": (CONVOLUTIONAL, 3),
    "named": (nn.Sequential(OrderedDict(first=nn.Linear(3, 4), second=nn.Softplus())), 3),
    "subclass of Sequential": (Stack(4), 3),
    "repeated": (nn.Sequential(nn.Linear(3, 4), SOFTPLUS, nn.Linear(4, 5), SOFTPLUS), 3),
    "list": (Listed(nn.ModuleList(two())), 3),
    "dictionary": (Listed(nn.ModuleDict(dict(zip("ab", two(), strict=True)))), 3),
}
# A kernel keeps log ε, which is exact for ε = 1.
PARTS = {
    "HMC": HMC(3, 1.0),
    "L2HMC": L2HMC(3, 2, 1.0, hidden=4, head_scale=0.1),
    "L2HMC with embedding": L2HMC(3, 2, 1.0, 4, observation_dim=6, embedding_hidden=(5, 4)),
    "coordinates": AmortizedPreconditioned(
        HMC(3, 1.0), GaussianNetwork(6, 3, (4,)), Encoder(6, 3, (4,))
    ),
    "Bernoulli": Bernoulli(),
    "Gaussian": Gaussian(0.3),
    "GenerativeModel": GenerativeModel(Decoder(3, 6, (4,)), 3, Gaussian(0.3)),
    "GenerativeModel by default": GenerativeModel(CONVOLUTIONAL, 3),
    "Preconditioned": Preconditioned(HMC(3, 1.0), torch.zeros(2), torch.ones(2, 2).tril()),
    **{name: module for name, (module, _) in FUNCTIONS.items()},
}


@pytest.mark.parametrize("name", PARTS)
def test_a_description_builds_the_same_function_anew(name: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)  # that of the parts
    module = PARTS[name]
    description = checked_description(module)
    torch.save(description, tmp_path / "description.pt")
    rebuilt = build(torch.load(tmp_path / "description.pt", weights_only=True))
    assert repr(rebuilt) == repr(module)
    assert str(describe(rebuilt)) == str(description)
    for argument in inspect.signature(type(module)).parameters:
        assert repr(getattr(rebuilt, argument, None)) == repr(getattr(module, argument, None))
    rebuilt.load_state_dict(module.state_dict())
    if name in FUNCTIONS:
        inputs = torch.rand(2, FUNCTIONS[name][1])
        torch.testing.assert_close(rebuilt(inputs), module(inputs), rtol=0, atol=0)


def test_a_description_is_in_the_format_of_jsonargparse() -> None:
    arguments = {"in_features": 3, "out_features": 6, "bias": True}
    expected = {"class_path": "torch.nn.modules.linear.Linear", "init_args": arguments}
    assert describe(nn.Linear(3, 6)) == expected


class Crafty(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function


PLAIN = [None, True, 3, 0.5, "relu", (1, (2, "a")), {"a": (1, "b")}, nn.Tanh(), {"a": nn.Tanh()}]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_arguments_survive(value: object) -> None:
    rebuilt = build(describe(Crafty(value)))
    assert repr(rebuilt.function) == repr(value)


@pytest.mark.parametrize(
    ("class_path", "arguments"),
    [
        ("os.system", {"command": "touch executed"}),
        ("subprocess.Popen", {"args": ["touch", "executed"]}),
        ("builtins.open", {"file": "executed", "mode": "w"}),
        ("pathlib.Path.touch", {"self": "executed"}),
        ("torch.nn.functional.softplus", {"input": 1.0}),
        ("torch.nn.NoSuchModule", {}),
    ],
)
def test_only_modules_are_built(
    class_path: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    description = {"class_path": class_path, "init_args": arguments}
    for hidden in (description, {**description, "init_args": [description]}):
        with pytest.raises((TypeError, ImportError), match=class_path.rpartition(".")[2]):
            build(hidden)
    inside = {"class_path": f"{__name__}.Crafty", "init_args": {"function": description}}
    with pytest.raises((TypeError, ImportError)):
        build(inside)
    assert not list(tmp_path.iterdir())


class Forgetful(nn.Module):
    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.width = width


class Flexible(nn.Module):
    def __init__(self, width: int, **options: float) -> None:
        super().__init__()
        self.width = width
        self.slope = nn.Softplus(beta=options.get("beta", 1.0))


class Shadowed(nn.Module):
    """Keeps a layer where the number that its constructor takes should be."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden: Any = nn.Linear(2, hidden)


class Grown(nn.Module):
    """Has a weight that its constructor did not make."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layer = nn.Linear(2, width)


TIED = nn.Linear(3, 3)
WIDER = Grown(4)
WIDER.layer = nn.Linear(2, 5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Forgetful(3), r"Forgetful .*constructor argument 'depth' as self\.depth"),
        (nn.Sequential(nn.Linear(3, 6), Forgetful(3)), "Forgetful"),
        (Flexible(4, beta=2.0), "Flexible .* its constructor takes any options"),
        (Crafty(torch.tanh), r"Crafty\(function=…\) is a builtin_function_or_method, "),
        (Crafty(object()), r"Crafty\(function=…\) is a object, "),
        (Crafty({1, 2}), r"Crafty\(function=…\) is a set, "),
        (Shadowed(3), "cannot be rebuilt from a checkpoint: empty"),
        (WIDER, r"layer.weight has shape \(5, 2\), but that .* arguments has \(4, 2\)"),
        (nn.Sequential(TIED, TIED), "layer 0 comes twice with the same weights"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), "cannot hold parametrizations"),
    ],
)
def test_what_a_checkpoint_would_not_rebuild_is_refused_at_once(
    module: nn.Module, message: str
) -> None:
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match=message):
        checked_description(module)
    assert torch.equal(torch.get_rng_state(), state)
