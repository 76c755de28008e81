"""The library's docstrings as mkdocstrings reads them: references become links, examples
blocks of code, and formulae what Arithmatex reads."""

from __future__ import annotations

import re
from typing import Any

import griffe

_PACKAGE = "mlframework.quantization"
_FORMULA = re.compile(r":math:`([^`]*)`")
_DISPLAYED_FORMULA = re.compile(r"^\.\. math:: (.*)$", re.MULTILINE)
_ROLE = re.compile(r":(?P<kind>func|class|meth|mod|attr|data):`~?\.*(?P<name>[^`]*)`")


class ReadableDocstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        public = pkg if pkg.path == _PACKAGE else pkg[_PACKAGE.partition(".")[2]]
        names = frozenset(public.exports or ())
        pending: list[griffe.Object] = [public]
        while pending:
            thing = pending.pop()
            if thing.docstring is not None:
                thing.docstring.value = _rewritten(thing.docstring.value, names)
            pending += [member for member in thing.members.values() if isinstance(member, griffe.Object)]


def _rewritten(text: str, public: frozenset[str]) -> str:
    def link(role: re.Match[str]) -> str:
        name = role["name"]
        return f"[`{name}`][{_PACKAGE}.{name}]" if name.partition(".")[0] in public else f"`{name}`"

    text = _FORMULA.sub(r"\\(\1\\)", text)
    text = _DISPLAYED_FORMULA.sub(r"\\[\1\\]", text)
    text = _ROLE.sub(link, text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # Griffe knows the section by this name
