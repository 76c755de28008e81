"""What code a result is of: after a change of what it rests on, and of nothing else, a run is to be made again."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path

from . import STUDIES
from .methods import OURS, Method
from .protocol import Study

_HERE = Path(__file__).parent
_REPOSITORY = _HERE.parents[1]
_LIBRARY = _REPOSITORY / "src" / "mlframework"
_ON_PATH = (_REPOSITORY, _REPOSITORY / "examples", _REPOSITORY / "benchmarks")
_SOURCES = (".py", ".cpp", ".h", ".inc")


def fingerprint(network: str, method: Method | None) -> str:
    """Of a network and its data, and of the method and its library (by its version, where it is a peer's).

    Args:
        network: a key of ``STUDIES``.
        method: None for the float network.
    """
    files = with_imported(_module_of(STUDIES[network]))
    version = ""
    if method is not None:
        files |= with_imported(method.file)
        version = str(method.version)
        if method.package == OURS:
            version = _library()
    return _digest(files) + version


def with_imported(file: Path) -> set[Path]:
    """A module of the study, and those of this repository that it imports, those that these import, and so on."""
    files, left = set(), [file]
    while left:
        file = left.pop()
        if file not in files:
            files.add(file)
            left.extend(_imported(file))
    return files


@cache
def _library() -> str:
    return _digest(path for path in _LIBRARY.rglob("*") if path.suffix in _SOURCES)


def _imported(file: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from _files(folder, names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            for folder in _ON_PATH:
                yield from _files(folder, names)


def _files(folder: Path, modules: Iterable[str]) -> Iterator[Path]:
    """Of modules and packages by their dotted names, those that there are."""
    for module in modules:
        place = folder / module.replace(".", "/")
        yield from (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.exists())


def _module_of(kind: type[Study]) -> Path:
    return Path(str(sys.modules[kind.__module__].__file__))


def _digest(files: Iterable[Path]) -> str:
    digest = sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
