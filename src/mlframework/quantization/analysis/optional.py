"""Packages that only the analysis takes, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def required(module: str, purpose: str) -> Any:
    """The module of an optional package.

    Raises:
        ImportError: the package is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs {package}, which is not installed: pip install 'mlframework-quantization[analysis]'"
        ) from error
