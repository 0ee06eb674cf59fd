"""The snippets of the README and of the site's pages run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"<!-- snippet -->\n```python\n(.*?)```", flags=re.DOTALL)
SNIPPETS = [
    pytest.param(
        code,
        id=f"{page.name}-{number}",
        marks=[pytest.mark.slow] if "learn(" in code else [],  # with its real budget
    )
    for page in PAGES
    for number, code in enumerate(SNIPPET.findall(page.read_text()), start=1)
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "page", "exec"), {})


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) > 5
