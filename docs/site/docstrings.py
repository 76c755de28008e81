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
        # By name, where it is shown: one that is also a package's (export) where it is defined.
        names = {
            name: public.imports[name] if public[name].is_module else f"{_PACKAGE}.{name}"
            for name in map(str, public.exports or ())
        }
        pending: list[griffe.Object] = [public]
        while pending:
            thing = pending.pop()
            if thing.docstring is not None:
                thing.docstring.value = _rewritten(thing.docstring.value, names)
            pending += [member for member in thing.members.values() if isinstance(member, griffe.Object)]


def _rewritten(text: str, public: dict[str, str]) -> str:
    def link(role: re.Match[str]) -> str:
        first, dot, rest = role["name"].partition(".")
        return f"[`{role['name']}`][{public[first]}{dot}{rest}]" if first in public else f"`{role['name']}`"

    text = _FORMULA.sub(r"\\(\1\\)", text)
    text = _DISPLAYED_FORMULA.sub(r"\\[\1\\]", text)
    text = _ROLE.sub(link, text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # Griffe knows the section by this name
