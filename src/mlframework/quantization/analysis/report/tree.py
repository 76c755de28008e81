"""The network as a tree of its modules, integer and float parts coloured."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from .rows import Row

_OPEN_DEPTH = 2


@dataclass
class _Branch:
    branches: dict[str, _Branch] = field(default_factory=dict)
    leaves: list[tuple[str, Row]] = field(default_factory=list)

    def rows(self) -> list[Row]:
        inside = [row for branch in self.branches.values() for row in branch.rows()]
        return [row for _, row in self.leaves] + inside


def strip(rows: list[Row], threshold: float) -> str:
    """A cell for every operation, in order."""
    cells = []
    for row in rows:
        classes = [*(["integer"] if row.is_integer else []), *(["bad"] if _is_bad(row, threshold) else [])]
        ratio = "" if row.measured is None else f", {row.measured.snr:.1f} dB"
        title = html.escape(f"{row.name}: {row.kind}, {'int8' if row.is_integer else 'float'}{ratio}")
        cells.append(f'<i class="{" ".join(classes)}" title="{title}"></i>')
    return f'<div class="strip">{"".join(cells)}</div>'


def tree(rows: list[Row], title: str) -> str:
    """Containers that open and close, with the layers and operations inside of them."""
    root = _Branch()
    for row in rows:
        *containers, last = row.entry.name.split(".")
        branch = root
        for container in containers:
            branch = branch.branches.setdefault(container, _Branch())
        branch.leaves.append((last, row))
    return f'<div class="tree">{_branch(title, root, 0)}</div>'


def _branch(name: str, branch: _Branch, depth: int) -> str:
    rows = branch.rows()
    integers = sum(row.is_integer for row in rows)
    work = sum(row.entry.multiply_adds for row in rows)
    done = sum(row.entry.multiply_adds for row in rows if row.is_integer)
    share = done / work if work else integers / len(rows)
    leaves = "".join(_leaf(label, row) for label, row in branch.leaves)
    inside = "".join(_branch(label, inner, depth + 1) for label, inner in branch.branches.items())
    opened = " open" if depth < _OPEN_DEPTH else ""
    return (
        f"<details{opened}><summary><code>{html.escape(name)}</code>"
        f'<span class="bar"><i style="width:{share:.1%}"></i></span>'
        f'<span class="kind">{integers} of {len(rows)} on integers</span></summary>{leaves}{inside}</details>'
    )


def _leaf(label: str, row: Row) -> str:
    form = "integer" if row.is_integer else "float"
    detail = html.escape(row.entry.detail)
    return (
        f'<div class="leaf"><span class="chip {form}">{"int8" if row.is_integer else "float"}</span>'
        f'<code>{html.escape(label or "(the model)")}</code><span class="kind">{html.escape(row.kind)}</span>'
        f'<span class="detail" title="{detail}">{detail}</span></div>'
    )


def _is_bad(row: Row, threshold: float) -> bool:
    return row.measured is not None and row.measured.breaks(threshold)
