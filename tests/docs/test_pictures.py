"""The script that draws the pictures of the pages runs, and draws those that there are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from docs.snippets import DOCS, PAGES


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location("pictures", DOCS / "site" / "pictures.py")
    assert specification is not None
    assert specification.loader is not None
    pictures = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(pictures)
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    pictures.main()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in (DOCS / "pictures").iterdir()}
    text = "".join((DOCS / page).read_text(encoding="utf-8") for page in PAGES)
    assert all(f"pictures/{name}" in text for name in names)
