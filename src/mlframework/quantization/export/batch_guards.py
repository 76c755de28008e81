"""Where a model's code fixes the batch size, for a warning to say so."""

from __future__ import annotations

import linecache
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch import nn

from .running_modules import RunningModules

_LOGGER = logging.getLogger("torch.fx.experimental.symbolic_shapes")
_GUARD = "[guard added]"


class BatchGuards(logging.Filter):
    """Reads what ``torch.export`` logs whenever code makes it assume something of a size.

    Args:
        running: tells which module that is.
    """

    def __init__(self, running: RunningModules) -> None:
        super().__init__()
        self.first: str | None = None
        self._running = running

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets errors alone be logged."""
        if self.first is None and _GUARD in record.getMessage():
            self.first = f"{self._running.innermost}{_line_of_forward()}"
        return record.levelno >= logging.ERROR


@contextmanager
def batch_guards(running: RunningModules) -> Iterator[BatchGuards]:
    """Reads along while a model is exported with a batch of any size."""
    guards = BatchGuards(running)
    level = _LOGGER.level
    _LOGGER.addFilter(guards)
    _LOGGER.setLevel(logging.INFO)
    try:
        yield guards
    finally:
        _LOGGER.setLevel(level)
        _LOGGER.removeFilter(guards)


def _line_of_forward() -> str:
    """The line that runs in the innermost forward, in parentheses; nothing where there is none with a source."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        first = next(iter(frame.f_code.co_varnames), "")
        is_forward = frame.f_code.co_name == "forward" or frame.f_code.co_name.startswith("_graph_")  # generated
        if is_forward and isinstance(frame.f_locals.get(first), nn.Module):
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).split(";")[0].strip()
            return f" ({line})" if line else ""
        frame = frame.f_back
    return ""
