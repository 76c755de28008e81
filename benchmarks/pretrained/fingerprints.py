"""What code a result is of: after a change of what it rests on, and of nothing else, a run is to be made again."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path

from . import STUDIES
from .methods import OURS, Method
from .protocol import Study

_HERE = Path(__file__).parent
_LIBRARY = _HERE.parents[1] / "src" / "mlframework"
_SOURCES = (".py", ".cpp", ".h", ".inc")
# These choose, keep and show what others measure.
_NOT_MEASURING = ("__init__.py", "command_line.py", "execution.py", "fingerprints.py", "runs.py", "summary.py")


def fingerprint(network: str, method: Method | None) -> str:
    """Of a network and its data, and of the method and its library (by its version, where it is a peer's).

    Args:
        network: a key of ``STUDIES``.
        method: None for the float network.
    """
    files = {path for path in _HERE.glob("*.py") if path.name not in (*_NOT_MEASURING, "recipes.py")}
    files -= {_module_of(kind) for name, kind in STUDIES.items() if name != network}
    version = ""
    if method is not None:
        files.add(method.file)
        version = str(method.version)
        if method.package == OURS:
            version = _library()
    return _digest(files) + version


@cache
def _library() -> str:
    return _digest(path for path in _LIBRARY.rglob("*") if path.suffix in _SOURCES)


def _module_of(kind: type[Study]) -> Path:
    return Path(str(sys.modules[kind.__module__].__file__))


def _digest(files: Iterable[Path]) -> str:
    digest = sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
