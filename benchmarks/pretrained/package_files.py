"""Networks from packages whose own ``__init__`` imports more than the network needs."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def import_alone(module: str, stand_ins: Mapping[str, Mapping[str, Any]]) -> types.ModuleType:
    """Imports one module of a package, with stand-ins for the packages and modules that it would import with it.

    ``torchcrepe`` and ``facenet_pytorch`` import audio and image libraries, some of them pinned to an old torch, of
    which their networks use nothing.

    Args:
        module: its full name; it stays importable by it.
        stand_ins: for every module to be replaced while this one is imported, its attributes.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    if module in sys.modules:
        return sys.modules[module]
    package = module.partition(".")[0]
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    with _replaced(stand_ins, list(spec.submodule_search_locations)):
        return importlib.import_module(module)


def folder_of(module: types.ModuleType) -> Path:
    """The folder that holds a module's file."""
    assert module.__file__ is not None
    return Path(module.__file__).parent


@contextmanager
def _replaced(stand_ins: Mapping[str, Mapping[str, Any]], search: list[str]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in stand_ins}
    for name, attributes in stand_ins.items():
        stand_in = types.ModuleType(name)
        stand_in.__dict__.update(attributes)
        stand_in.__path__ = ["/".join([location, *name.split(".")[1:]]) for location in search]
        sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name, original in before.items():
            if original is None:
                del sys.modules[name]
            else:
                sys.modules[name] = original
