"""Progress of long analyses, shown where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .optional import required


@contextmanager
def progress_of(description: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """What to call after each of ``total`` steps.

    Raises:
        ImportError: it is to be shown, and rich is not installed.
    """
    if not shown:
        yield lambda: None
        return
    rich = required("rich.progress", "progress=True")
    columns = (*rich.Progress.get_default_columns(), rich.MofNCompleteColumn())
    with rich.Progress(*columns) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
