from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dglm import Bernoulli, Decoder, Encoder, Gaussian, GenerativeModel
from dglm.coordinates import AmortizedPreconditioned, GaussianNetwork
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
MODULES = {
    "Encoder": (Encoder(6, 3, (4, 5)), (2, 6)),
    "Decoder": (Decoder(3, 6, (4,), output_scale=0.5), (2, 3)),
    "linear": (nn.Linear(3, 6, bias=False), (2, 3)),
    "convolutional": (CONVOLUTIONAL, (2, 3)),
}
# A kernel keeps log ε, which is exact for ε = 1.
PARTS = {
    "HMC": HMC(3, 1.0),
    "L2HMC": L2HMC(3, 2, 1.0, hidden=4, head_scale=0.1),
    "L2HMC with embedding": L2HMC(3, 2, 1.0, 4, observation_dim=6, embedding_hidden=(5, 4)),
    "coordinates": AmortizedPreconditioned(HMC(3, 1.0), GaussianNetwork(6, 3, (4,))),
    "Bernoulli": Bernoulli(),
    "Gaussian": Gaussian(0.3),
    "GenerativeModel": GenerativeModel(Decoder(3, 6, (4,)), 3, Gaussian(0.3)),
    "GenerativeModel by default": GenerativeModel(CONVOLUTIONAL, 3),
    "Preconditioned": Preconditioned(HMC(3, 1.0), torch.zeros(2), torch.ones(2, 2).tril()),
    **{name: module for name, (module, _) in MODULES.items()},
}


def through_a_file(description: Any, folder: Path) -> Any:
    torch.save(description, folder / "description.pt")
    return torch.load(folder / "description.pt", weights_only=True)


@pytest.mark.parametrize("name", PARTS)
def test_a_description_builds_the_same_architecture(name: str, tmp_path: Path) -> None:
    module = PARTS[name]
    description = describe(module)
    rebuilt = build(through_a_file(description, tmp_path))
    assert repr(rebuilt) == repr(module)
    assert str(describe(rebuilt)) == str(description)
    rebuilt.load_state_dict(module.state_dict())


@pytest.mark.parametrize("name", MODULES)
def test_the_rebuilt_module_computes_the_same_function(name: str) -> None:
    module, shape = MODULES[name]
    module = build(describe(module)).float()
    rebuilt = build(describe(module)).float()
    rebuilt.load_state_dict(module.state_dict())
    inputs = torch.rand(shape).float()
    outputs, expected = rebuilt(inputs), module(inputs)
    if isinstance(expected, Tensor):
        outputs, expected = (outputs,), (expected,)
    assert all(map(torch.equal, outputs, expected))


def test_settings_outside_the_state_dict_survive() -> None:
    kernel, likelihood = build(describe(PARTS["HMC"])), build(describe(PARTS["Gaussian"]))
    assert isinstance(kernel, HMC)
    assert kernel.num_leapfrogs == 3
    assert isinstance(likelihood, Gaussian)
    assert likelihood.scale == 0.3
    assert float(build(describe(HMC(3, 0.2))).step_size) == pytest.approx(0.2)
    kernel = build(describe(PARTS["L2HMC with embedding"]))
    assert isinstance(kernel, L2HMC)
    assert (kernel.hidden, kernel.observation_dim, kernel.embedding_hidden) == (4, 6, (5, 4))


def test_a_description_is_in_the_format_of_jsonargparse() -> None:
    arguments = {"in_features": 3, "out_features": 6, "bias": True}
    expected = {"class_path": "torch.nn.modules.linear.Linear", "init_args": arguments}
    assert describe(nn.Linear(3, 6)) == expected


def test_modules_pass_through_build() -> None:
    module = nn.Linear(3, 6)
    assert build(module) is module


class Forgetful(nn.Module):
    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.width = width


class Stack(nn.Sequential):
    """A Sequential with a constructor of its own, as torchvision's MLP is one."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(3, width), nn.Softplus())
        self.width = width


class Flexible(nn.Module):
    def __init__(self, width: int, **options: float) -> None:
        super().__init__()
        self.width = width
        self.slope = nn.Softplus(beta=options.get("beta", 1.0))


class Crafty(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function


def test_a_module_that_drops_a_constructor_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"Forgetful .*constructor argument 'depth' as self\.depth"):
        describe(Forgetful(3))
    with pytest.raises(TypeError, match="Forgetful"):
        describe(nn.Sequential(nn.Linear(3, 6), Forgetful(3)))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(OrderedDict(first=nn.Linear(3, 4), second=nn.Softplus())),
        Stack(4),
        Flexible(4, beta=2.0),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
    ],
    ids=["named layers", "subclass of Sequential", "options", "weight norm"],
)
def test_a_module_is_rebuilt_faithfully_or_refused_at_once(module: nn.Module) -> None:
    try:
        description = describe(module)
    except TypeError:
        return
    rebuilt = build(description)
    assert repr(rebuilt) == repr(module)
    rebuilt.load_state_dict(module.state_dict())


@pytest.mark.parametrize("value", [torch.tanh, object(), {1, 2}])
def test_arguments_that_are_no_plain_data_are_named(value: object) -> None:
    with pytest.raises(TypeError, match=rf"Crafty\(function=…\) is a {type(value).__name__}, "):
        describe(Crafty(value))


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
        with pytest.raises((TypeError, ImportError)):
            build(hidden)
    inside = {"class_path": f"{__name__}.Crafty", "init_args": {"function": description}}
    with pytest.raises((TypeError, ImportError)):
        build(inside)
    assert not list(tmp_path.iterdir())


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(TypeError, match=r"os\.system is not a subclass of torch\.nn\.Module"):
        build({"class_path": "os.system", "init_args": {"command": "true"}})


def test_an_activation_may_come_again() -> None:
    activation = nn.Softplus()
    decoder = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 5), activation)
    rebuilt = build(checked_description(decoder))
    rebuilt.load_state_dict(decoder.state_dict())
    z = torch.randn(2, 3)
    torch.testing.assert_close(rebuilt(z), decoder(z))


class Listed(nn.Module):
    def __init__(self, layers: nn.ModuleList | nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, z: Tensor) -> Tensor:
        layers = self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers
        return sum(layer(z) for layer in layers)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "layers",
    [
        nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)]),
        nn.ModuleDict({"one": nn.Linear(3, 4), "other": nn.Linear(3, 4)}),
    ],
)
def test_lists_of_modules_are_rebuilt(layers: nn.ModuleList | nn.ModuleDict) -> None:
    module = Listed(layers).double()
    rebuilt = build(checked_description(module))
    rebuilt.load_state_dict(module.state_dict())
    z = torch.randn(2, 3)
    torch.testing.assert_close(rebuilt(z), module(z))


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
