"""What an engine's files take beside PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs_extra(engine: str, package: str, extra: str) -> Iterator[None]:
    """Names the extra to install where an import fails.

    Args:
        engine: what the files are for.
        package: what is imported.
        extra: of this library, which brings it.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"files for {engine} need {package} ({error}): pip install 'mlframework-quantization[{extra}]'"
        ) from error
