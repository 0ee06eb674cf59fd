"""The compiled chain of a training step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dglm import DGLM
from experiments.mnist import command_line, main, train
from experiments.shared.callbacks import WORTH_COMPILING
from experiments.shared.cli import CommandError
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


def test_a_training_that_recomputes_keeps_less_and_is_the_same(
    small: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Kernel.compile
    backend = "aot_eager_decomp_partition"  # divides the work as the real one does
    monkeypatch.setattr(Kernel, "compile", lambda kernel: original(kernel, backend=backend))
    kept, models = [], []
    for recompute in ("false", "true"):
        torch.compiler.reset()
        folder = tmp_path / recompute
        options = small(folder, compile="true", recompute=recompute, model__num_mh_steps=10)
        cli = command_line(options)
        kept.append([])
        cli.model.training_step = counting(cli.model.training_step, kept[-1])
        train(cli)
        models.append(DGLM.load_from_checkpoint(folder / "checkpoints/last.ckpt").state_dict())
    torch.testing.assert_close(models[1], models[0], rtol=1e-4, atol=1e-6)
    assert sum(kept[1][-1].values()) < 0.5 * sum(kept[0][-1].values())


def counting(step: Callable, kept: list[dict[int, int]]) -> Callable:
    """Append what each call of a step but the first keeps for its backward pass: places, sizes.

    The first compiles, during which nothing may count.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[-1][tensor.data_ptr()] = tensor.numel()
        return tensor

    def counted(*arguments: object) -> torch.Tensor:
        kept.append({})
        if len(kept) == 1:
            return step(*arguments)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return step(*arguments)

    return counted


def test_nothing_is_recomputed_where_nothing_is_compiled(small: Arguments, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="add --compile true"):
        train(command_line(small(tmp_path / "run", recompute="true")))
    assert not (tmp_path / "run").exists()


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


def test_a_training_long_enough_is_compiled_and_a_short_one_is_not(
    small: Arguments,
    tmp_path: Path,
    compilations: list[type[Kernel]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Four updates of 20 images and 5 gradients each.
    for least, number in ((WORTH_COMPILING, 0), (401, 0), (400, 1)):
        monkeypatch.setattr("experiments.shared.callbacks.WORTH_COMPILING", least)
        main(small(tmp_path / str(least)))
        assert len(compilations) == number
    monkeypatch.setattr("experiments.shared.callbacks.WORTH_COMPILING", 200)
    main(small(tmp_path / "hmc", kernel="hmc"))
    main(small(tmp_path / "vae", kernel="none", compile="true"))
    assert len(compilations) == 1
