"""The site's reading of docstrings: Sphinx's formulas and roles as Markdown."""

import re
import textwrap
from typing import Any

import griffe

_FORMULA = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *(?=\n\1 )))*)", flags=re.MULTILINE)
_EXAMPLE = re.compile(r"^( *)Example:$", flags=re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?([^`]+)`")


class Markdown(griffe.Extension):
    """Rewrites each docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Put formulas between double dollars, names in backquotes, examples where code goes."""
        if obj.docstring is not None:
            text = _FORMULA.sub(_displayed, obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", _ROLE.sub(r"`\1`", text))


def _displayed(found: re.Match[str]) -> str:
    indent, formula = found[1], textwrap.dedent(" " * 99 + found[2]).strip()
    lines = [line.strip() for line in formula.splitlines() if line.strip()]
    if any("&" in line for line in lines):
        lines = [r"\begin{aligned}", *lines, r"\end{aligned}"]
    return "\n".join(indent + line for line in ["", "$$", *lines, "$$", ""])
