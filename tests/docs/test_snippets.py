"""Every block of Python in the documents runs as it stands, those of a page one after the other."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from docs.page_setups import run_blocks
from docs.snippets import PAGES, number_of_fences, snippets

KINDS = ("", "before", "file", "needs")
# In export/test_executorch.py, whose process has imported ExecuTorch, where it is installed.
ELSEWHERE = ("how-to/executorch.md", "index.md") if importlib.util.find_spec("executorch") else ()


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_valid_and_say_what_is_done_with_them(page: str) -> None:
    found = list(snippets(page))
    assert len(found) == number_of_fences(page), "a block that is not written as the others"
    for snippet in found:
        assert snippet.tree.body
        assert snippet.kind in KINDS


@pytest.mark.slow
# It is about the processor: this one's plain products saturate.
@pytest.mark.filterwarnings("ignore:.*saturat:UserWarning")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in ELSEWHERE and any(one.kind != "before" for one in snippets(page))]
)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(page)
