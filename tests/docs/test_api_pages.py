"""The pages of the API have every public name, each once."""

from __future__ import annotations

import re
from collections import Counter

import mlframework.quantization as quantization
from docs.snippets import DOCS, PAGES

# By its public path; a name that is also a package's (export) by the path where it is defined.
_OBJECT = re.compile(r"^::: mlframework\.quantization\.(?!integrations\.)(?:[\w.]+\.)?(\w+)$", re.MULTILINE)


def test_every_public_name_is_on_one_page() -> None:
    shown = Counter(name for page in PAGES for name in _OBJECT.findall((DOCS / page).read_text(encoding="utf-8")))
    assert shown == Counter(quantization.__all__)
