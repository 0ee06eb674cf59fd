"""The compiled chain of a training step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dglm import DGLM
from experiments.mnist import command_line, main, train
from samplers import Kernel

Arguments = Callable[..., list[str]]

pytestmark = [
    pytest.mark.skipif(
        not torch._dynamo.is_dynamo_supported(), reason="torch.compile does not run here"
    ),
    # The compiler itself looks at the .grad of the context, and does what it warns of here.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # Torch 2.11's own.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[type[Kernel]]:
    """Compile by a backend that takes no time; return the kernels that were compiled."""
    torch.compiler.reset()
    found: list[type[Kernel]] = []
    original = Kernel.compile

    def compile(kernel: Kernel) -> None:
        found.append(type(kernel))
        original(kernel, backend="aot_eager")

    monkeypatch.setattr(Kernel, "compile", compile)
    return found


@pytest.mark.parametrize("kernel", ["hmc", "l2hmc"])
def test_a_compiled_training_is_the_eager_one(
    kernel: str, small: Arguments, tmp_path: Path, compilations: list[type[Kernel]]
) -> None:
    models = []
    for compile in ("false", "true"):
        main(small(tmp_path / compile, kernel=kernel, compile=compile))
        checkpoint = tmp_path / compile / "checkpoints" / "last.ckpt"
        models.append(DGLM.load_from_checkpoint(checkpoint).state_dict())
    assert [each.__name__.lower() for each in compilations] == [kernel]
    assert models[0].keys() == models[1].keys()
    torch.testing.assert_close(models[1], models[0], rtol=1e-3, atol=1e-5)


def test_only_the_training_step_runs_compiled_code(
    small: Arguments, tmp_path: Path, compilations: list[type[Kernel]]
) -> None:
    cli = command_line(small(tmp_path / "run", compile="true"))
    before = cli.model.kernel
    seen = set()

    def note(dglm: DGLM, step: str) -> None:
        original = getattr(dglm, step)

        def noted(*arguments: object) -> object:
            seen.add((step, dglm.kernel is before))
            return original(*arguments)

        setattr(dglm, step, noted)

    for step in ("training_step", "validation_step"):
        note(cli.model, step)
    train(cli)
    assert seen == {("training_step", False), ("validation_step", True)}
    assert cli.model.kernel is before
    assert len(compilations) == 1


def test_the_banner_says_where_compiling_pays(
    small: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Four updates of 20 images and 5 gradients each; HMC's must be three times as many.
    rows = []
    for index, (kernel, least) in enumerate([("l2hmc", 401), ("l2hmc", 400), ("hmc", 400)]):
        monkeypatch.setattr("experiments.shared.callbacks.WORTH_COMPILING", least)
        train(command_line(small(tmp_path / str(index), kernel=kernel, quiet="false")))
        lines = capsys.readouterr().out.splitlines()
        rows.append(next(line for line in lines if "compiled" in line).split(maxsplit=1)[1].strip())
    assert rows == [
        "nothing",
        "nothing; --compile true makes a training of this length faster",
        "nothing",
    ]
