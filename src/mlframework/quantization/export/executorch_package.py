"""ExecuTorch, imported where it is needed: it takes seconds, and says much about itself."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from .engine_extra import needs_extra
from .program import quiet


def import_lowering() -> tuple[Any, Any]:
    """``to_edge_transform_and_lower`` and the partitioner of XNNPACK.

    Raises:
        ImportError: executorch is not installed; the message says which extra has it.
    """
    with needs_extra("ExecuTorch", "executorch", "executorch"), quiet_executorch():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    return to_edge_transform_and_lower, XnnpackPartitioner


def import_runtime() -> Any:
    """``executorch.runtime.Runtime``.

    Raises:
        ImportError: executorch is not installed; the message says which extra has it.
    """
    with needs_extra("ExecuTorch", "executorch", "executorch"), quiet_executorch():
        from executorch.runtime import Runtime

        Runtime.get()  # imports what is experimental, and says so
    return Runtime


def input_shapes(method: Any) -> list[tuple[int, ...] | None]:
    """The largest shape of each input of a method of a program; None where it is no tensor."""
    meta = method.metadata
    shapes: list[tuple[int, ...] | None] = []
    for index in range(meta.num_inputs()):
        try:
            shapes.append(tuple(meta.input_tensor_meta(index).sizes()))
        except (IndexError, RuntimeError):  # what it says of numbers
            shapes.append(None)
    return shapes


@contextlib.contextmanager
def quiet_executorch() -> Iterator[None]:
    """Without what ExecuTorch, and the torchao that it imports, say about themselves."""
    loggers = [(logger, logger.level) for logger in map(logging.getLogger, ("torchao", "torch.utils._pytree", "root"))]
    for logger, _ in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)
