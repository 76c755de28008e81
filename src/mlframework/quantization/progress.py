"""Progress of long loops, through rich where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str, total: int, *, done: int = 0, shown: bool) -> Iterator[Callable[..., None]]:
    """A function that advances a bar by one, with a text beside it where it is given one; without ``shown``, one that
    does nothing.

    Raises:
        ImportError: rich is not installed.
    """
    if not shown:
        yield lambda text="": None
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise ImportError(
            "progress=True needs rich, which is not installed: pip install 'mlframework-quantization[analysis]'"
        ) from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(description, total=total, completed=done, text="")
        yield lambda text="": progress.update(task, advance=1, text=text)
