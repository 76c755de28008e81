"""The blocks of Python in a page of the documents, and what of them can run here.

A block's title says if it is not simply run:

- ``before: ...``: another library's calls, beside ours. It is valid Python, and is not run.
- ``file: ...``: a file, which runs apart from the other blocks.
- ``needs: ...``: it runs where these modules are installed.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))

_BLOCK = re.compile(
    r"^(?P<indent> *)```python(?: title=\"(?P<title>[^\"]*)\")?\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_FENCE = re.compile(r"^ *```\S", re.MULTILINE)


@dataclass(frozen=True)
class Snippet:
    """A block: its page, the line that its code begins with, what its title says."""

    page: str
    line: int
    code: str
    kind: str  # "" (it is run), "before", "file", "needs"
    subject: str

    @property
    def tree(self) -> ast.Module:
        """Parsed, with the lines of its page."""
        return ast.increment_lineno(ast.parse(self.code, filename=str(DOCS / self.page)), self.line - 1)

    @property
    def missing(self) -> list[str]:
        """What it needs and is not there."""
        needed = self.subject.split(", ") if self.kind == "needs" else []
        return [name for name in needed if importlib.util.find_spec(name) is None]


def snippets(page: str) -> Iterator[Snippet]:
    """The blocks of a page, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for block in _BLOCK.finditer(text):
        kind, _, subject = (block["title"] or "").partition(": ")
        code = re.sub(rf"^{block['indent']}", "", block["code"], flags=re.MULTILINE)
        yield Snippet(page, text.count("\n", 0, block.start("code")) + 1, code, kind, subject)


def number_of_fences(page: str) -> int:
    """How many blocks of Python a page has, however they are written."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return sum(text[fence.end() - 1 :].startswith(("python", "py", "{")) for fence in _FENCE.finditer(text))
