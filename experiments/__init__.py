"""The commands: one module each, run as ``python -m experiments.NAME``."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def _load_beside(name: str) -> None:
    """Load the package of this name beside this one, where Python would take another for it.

    It looks into the working directory first, which often has a folder ``data``.
    """
    path = Path(__file__).resolve().parents[1] / name / "__init__.py"
    found = find_spec(name)
    if found is not None and found.origin and Path(found.origin).resolve() == path:
        return
    spec = spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


for _name in ("samplers", "data", "dglm"):
    _load_beside(_name)
