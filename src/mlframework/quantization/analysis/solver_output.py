"""What a solver written in C++ prints by itself, kept from a program's output."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_STDOUT = 1
_OF_THE_SOLVER = b"HighsMipSolverData::"


@contextmanager
def without_solver_output() -> Iterator[None]:
    """Leaves out of standard output what HiGHS, the solver inside SciPy's ``milp``, prints for its developers.

    HiGHS 1.12 prints the name of a function where a solution has to be repaired, whatever ``disp`` is. It writes to the
    file descriptor, past ``sys.stdout``; so that is a file meanwhile. All else that the process writes there comes out
    at the end. Without a standard output, nothing is done.
    """
    try:
        own = os.dup(_STDOUT)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), _STDOUT)
        try:
            yield
        finally:
            os.dup2(own, _STDOUT)
            os.close(own)
            written.seek(0)
            for line in written:
                if not line.startswith(_OF_THE_SOLVER):
                    _write(line)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(_STDOUT, data) :]
