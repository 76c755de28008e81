"""Tables with a column for each kind of processor: a run renews the column of the processor that it is on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from results_file import environment, read_section, write_section

from mlframework.quantization.kernels import instruction_set

KINDS = ("avx512_vnni", "avx2")

Row = tuple[str, ...]


class ColumnsByKind:
    """Cells by row, those of earlier runs on other kinds of processor among them.

    Args:
        section: of RESULTS.md.
        heads: the names of the columns that say which row it is.

    Raises:
        ValueError: this processor is of no kind that has a column.
    """

    def __init__(self, section: str, heads: Sequence[str]) -> None:
        if instruction_set() not in KINDS:
            raise ValueError(f"the table has columns for {' and '.join(KINDS)}, got {instruction_set()}")
        self.section = section
        self.heads = tuple(heads)
        self.cells: dict[Row, dict[str, str]] = {}
        self.machines: dict[str, str] = {}
        for line in read_section(section).splitlines():
            if machine := re.fullmatch(r"- `(\w+)`: (.*)", line):
                self.machines[machine[1]] = machine[2]
            parts = [part.strip() for part in line.strip("|").split("|")]
            is_row = len(parts) == len(self.heads) + len(KINDS) and parts[-1] != KINDS[-1] and "---" not in parts[0]
            if is_row:
                self.cells[tuple(parts[: len(self.heads)])] = dict(zip(KINDS, parts[len(self.heads) :], strict=True))

    def set(self, row: Row, cell: str) -> None:
        """A cell of this processor's column."""
        self.cells.setdefault(row, {})[instruction_set()] = cell

    def write(self, title: str, description: Sequence[str]) -> None:
        """Writes the section."""
        self.machines[instruction_set()] = f"{processor()}. {environment()}"
        write_section(self.section, "\n".join(self._lines(title, description)))

    def _lines(self, title: str, description: Sequence[str]) -> Iterator[str]:
        yield from (f"## {title}", "", *description, "")
        yield from (f"- `{kind}`: {machine}" for kind, machine in self.machines.items())
        yield from ("", f"| {' | '.join((*self.heads, *KINDS))} |", f"|{'---|' * (len(self.heads) + len(KINDS))}")
        for row, cells in self.cells.items():
            yield f"| {' | '.join((*row, *(cells.get(kind, '') for kind in KINDS)))} |"


def processor() -> str:
    """Its name; and that it is held to fewer instructions than it has, where it is."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"model name\s*: (.*)", text)
    held = instruction_set() == "avx2" and " avx512_vnni" in text
    return (name[1] if name else "unknown processor") + (" with its AVX-512 hidden" if held else "")
