"""What docs/training-step.md names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "training-step.md").read_text()
PLACES = re.findall(r"\| `([\w/]+\.py)` \| `(\w+)` \|$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_places_are_there(file: str, name: str) -> None:
    text = (ROOT / file).read_text()
    assert re.search(rf"^\s*(def|class) {name}\b", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+(?:\.py|/))`", PAGE))))
def test_files_and_folders_are_there(name: str) -> None:
    assert (ROOT / name).exists()


def test_the_batch_is_followed() -> None:
    assert len(PLACES) == 17
