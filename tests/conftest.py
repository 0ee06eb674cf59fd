"""One thread for each test process and what it starts: there are as many processes as cores."""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = ("in_processes", "learned", "compared", "in_two", "checkpoints", "done", "checkpoint")
"""Fixtures that take seconds and serve several tests: two processes would make them twice."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the tests that share such a fixture run in one process."""
    for item in items:
        used = [name for name in SHARED if name in getattr(item, "fixturenames", ())]
        if used:
            item.add_marker(pytest.mark.xdist_group(used[0]))


class Compiler:
    """A backend of torch.compile that keeps the graphs and leaves them to another one."""

    def __init__(self) -> None:
        self.backend = "eager"  # which takes no time
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    """A backend for a test that compiles, where torch can."""
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run here")
    torch.compiler.reset()
    with warnings.catch_warnings():
        # The compiler itself looks at the .grad of what it is given, and warns of that.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
        # Until torch 2.14 it warns of itself.
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*torch.jit.script_method", DeprecationWarning)
        yield Compiler()
