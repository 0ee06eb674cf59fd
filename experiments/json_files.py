"""The JSON files of results that the commands write and read."""

import json
import math
from pathlib import Path
from typing import Any

from samplers.io import write_whole


def write_json(content: Any, path: Path) -> None:
    """Write results; what is no finite number becomes null, as JSON has no word for it."""
    write_whole(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", path)


def read_json(path: Path) -> Any:
    """Return what :func:`write_json` wrote, with NaN where it wrote null."""
    return json.loads(path.read_text(), object_hook=_with_nan)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(found: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in found.items()}
