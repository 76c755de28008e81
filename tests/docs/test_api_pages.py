"""The pages of the API have every public name, each once."""

from __future__ import annotations

import re
from collections import Counter

import mlframework.quantization as quantization
from docs.snippets import DOCS, PAGES

_OBJECT = re.compile(r"^::: mlframework\.quantization\.([\w.]+)$", re.MULTILINE)


def test_every_public_name_is_on_one_page() -> None:
    shown = Counter(
        name
        for page in PAGES
        for name in _OBJECT.findall((DOCS / page).read_text(encoding="utf-8"))
        if not name.startswith("integrations.")  # which the package does not import
    )
    assert shown == Counter(quantization.__all__)
