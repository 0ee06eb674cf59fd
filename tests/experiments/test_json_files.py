"""Results as JSON: what is no finite number is null there."""

import math
from pathlib import Path

from experiments.json_files import read_json, write_json


def test_numbers_that_are_not_finite_become_null_and_nan_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json({"ess": math.nan, "chains": 3, "rows": [{"pair": (0.5, math.inf)}]}, path)
    assert (
        "".join(path.read_text().split()) == '{"ess":null,"chains":3,"rows":[{"pair":[0.5,null]}]}'
    )
    found = read_json(path)
    assert math.isnan(found["ess"])
    assert found["chains"] == 3
