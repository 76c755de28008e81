"""What docs/saving.md shows runs, one snippet after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "saving.md"


def test_the_snippets_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet, names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "model.safetensors"]
