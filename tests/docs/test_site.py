"""The site is built without a warning, and its pages load nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from docs.snippets import DOCS, PAGES

pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs installs it")
pytest.importorskip("material", reason="mkdocs-material is not installed: make docs installs it")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: make docs installs it")

pytestmark = pytest.mark.slow

_FETCHED_BY_CSS = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')]*)""")


class _Page(HTMLParser):
    """What a browser fetches for a page by itself: all but what a reader clicks on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        is_read_alone = tag == "link" and own.get("rel") in ("canonical", "prev", "next")
        for name in ("src", "srcset", "href"):
            if own.get(name) and tag != "a" and not is_read_alone:
                self.fetched.append(str(own[name]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr[-4000:]
    return folder


def test_every_page_is_built(site: Path) -> None:
    built = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert built >= {page.replace(".md", ".html") for page in PAGES}


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert [name for name in _Page(text).fetched if "//" in name] == [], path.name
        assert _FETCHED_BY_CSS.findall(text) == [], path.name
    for path in site.rglob("*.css"):
        assert _FETCHED_BY_CSS.findall(path.read_text(encoding="utf-8")) == [], path.name


def test_no_docstring_is_shown_unread(site: Path) -> None:
    """References are links or code, and examples are blocks of code."""
    for path in (site / "api").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r":(func|class|meth|mod|attr):", text), path.name
        assert "&gt;&gt;&gt;" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL), path.name
