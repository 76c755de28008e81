"""Links from the pages to documents of the repository that lie elsewhere: those become pages of the site, too.
And formulae as MathML, which browsers show without a script."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[2]

# By their paths in the repository: the pages that they become.
_ELSEWHERE = {
    "benchmarks/RESULTS.md": "measured.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/lightning_digits.py": "examples/lightning_digits.md",
    "examples/transformers_digits.py": "examples/transformers_digits.md",
}
_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: Any) -> Files:
    """Adds the documents that lie elsewhere."""
    for path, page in _ELSEWHERE.items():
        text = (_ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".py"):
            text = f"---\nhide: [toc]\n---\n# {path}\n\n```python\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Turns links between files of the repository into links between pages."""
    here = page.file.src_uri
    origin = {shown: path for path, shown in _ELSEWHERE.items()}.get(here, f"docs/{here}")

    def shown(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link["path"]))
        if path in _ELSEWHERE:
            target = _ELSEWHERE[path]
        elif path.startswith("docs/"):
            target = path.removeprefix("docs/")
        else:
            return link[0]
        return posixpath.relpath(target, posixpath.dirname(here) or ".") + (link["anchor"] or "")

    return _LINK.sub(shown, markdown)


def on_page_content(text: str, page: Page, config: Any, files: Files) -> str:
    """Writes formulae, which Arithmatex has found, as MathML."""

    def shown(formula: re.Match[str]) -> str:
        display = "block" if formula["tag"] == "div" else "inline"
        return str(latex2mathml.converter.convert(html.unescape(formula["latex"]), display=display))

    return _FORMULA.sub(shown, text)
