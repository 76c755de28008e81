"""Where a model's code fixes the size of an axis, for a warning or an error to say so."""

from __future__ import annotations

import linecache
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from torch import nn

from .running_modules import RunningModules

_LOGGER = logging.getLogger("torch.fx.experimental.symbolic_shapes")

# What PyTorch logs: a size is given a symbol, something is assumed of one, a symbol turns out to be a number.
_SOURCE = r"L\['(?P<argument>\w+)'\](?P<keys>.*?)\.size\(\)\[(?P<axis>\d+)\]"
_SYMBOL = re.compile(rf"create_symbol (?P<symbol>\w+) = \d+ for {_SOURCE}")
_GUARD = re.compile(r"eval (?P<expression>.+?) \[guard added\]")
_CONSTANT = re.compile(r"set_replacement (?P<symbol>\w+) = (?P<size>\d+) ")


class SizeGuards(logging.Filter):
    """Reads what ``torch.export`` logs whenever code makes it assume something of a size.

    Args:
        running: tells which module that is.

    Attributes:
        first: the first code that assumes something; None where there is none.
    """

    def __init__(self, running: RunningModules) -> None:
        super().__init__()
        self.first: str | None = None
        self._running = running
        self._axes: dict[str, re.Match[str]] = {}  # by symbol
        self._assumed: list[tuple[str, str]] = []  # what, and by which code
        self._sizes: dict[str, str] = {}  # of symbols that turned out to be numbers

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets errors alone be logged."""
        message = record.getMessage()
        if guard := _GUARD.search(message):
            place = f"{self._running.innermost}{_line_of_forward()}"
            self.first = self.first or place
            self._assumed.append((guard["expression"], place))
        elif symbol := _SYMBOL.search(message):
            self._axes[symbol["symbol"]] = symbol
        elif constant := _CONSTANT.search(message):
            self._sizes.setdefault(constant["symbol"], constant["size"])
        return record.levelno >= logging.ERROR

    def reasons(self, error: Exception, user_names: Mapping[str, str]) -> str:
        """Why axes cannot be of any size: the size that code takes, or what else it assumes, and what PyTorch suggests.

        Args:
            error: that ``torch.export`` raised.
            user_names: the names that arguments have in the user's own forward, where they are others.
        """

        def words(match: re.Match[str]) -> str:
            argument = user_names.get(match["argument"], match["argument"])
            return f"axis {match['axis']} of {argument + match['keys']!r}"

        found = [
            f"{words(self._axes[symbol])} has to be {size} for {self._code(symbol, size)}"
            for symbol, size in self._sizes.items()
            if symbol in self._axes
        ]
        lines = [line.strip() for line in str(error).splitlines()]
        seen: set[str] = set(self._sizes)
        for line in lines:
            if line.startswith("- ") and "specialized it to be a constant" not in line:
                symbols = [symbol for symbol, match in self._axes.items() if match[0].partition(" for ")[2] in line]
                if seen.isdisjoint(symbols):  # the first of what is assumed of an axis
                    code = next((self._code(symbol) for symbol in symbols), "the model")
                    found.append(f"{re.sub(_SOURCE, words, line[2:]).rstrip('.')} (for {code})")
                    seen.update(symbols)
        if "Suggested fixes:" in lines:
            fixes = [line for line in lines[lines.index("Suggested fixes:") + 1 :] if re.match(r"\w+ = ", line)]
            found.append(f"torch.export suggests {', '.join(fixes)}")
        return "; ".join(found) or (lines[0] if lines else type(error).__name__)

    def _code(self, symbol: str, size: str = "") -> str:
        """The code that made a symbol that size, or else that first assumed something of it."""
        own = [(what, place) for what, place in self._assumed if re.search(rf"\b{symbol}\b", what)]
        exact = [place for what, place in own if what == f"Eq({symbol}, {size})"]
        return (exact or [place for _, place in own] or ["the model"])[0]


@contextmanager
def size_guards(running: RunningModules) -> Iterator[SizeGuards]:
    """Reads along while a model is exported with axes of any size."""
    guards = SizeGuards(running)
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
