"""Tables of reports: as text for a terminal, as HTML for a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()) -> str:
    """Columns of text under a header; those of ``numbers`` are aligned to the right.

    Example:
        >>> print(text_table(("layer", "dB"), [("stem", "9.5"), ("head", "21.0")], numbers=[1]))
        layer    dB
        stem    9.5
        head   21.0
    """
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = set(numbers)
    return "\n".join(
        "  ".join(
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = (), notes: Iterable[str] = ()
) -> str:
    """The same as a ``<table>``, everything escaped, with notes below.

    Example:
        >>> html_table(("layer",), [("a<b",)])
        '<table><thead><tr><th>layer</th></tr></thead><tbody><tr><td>a&lt;b</td></tr></tbody></table>'
    """
    right = set(numbers)

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f'<{tag} style="text-align:right">{html.escape(text)}</{tag}>'
            if column in right
            else f"<{tag}>{html.escape(text)}</{tag}>"
            for column, text in enumerate(cells)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{line('th', header)}</tr></thead><tbody>{body}</tbody></table>"
    return table + "".join(f"<p>{html.escape(note)}</p>" for note in notes)
