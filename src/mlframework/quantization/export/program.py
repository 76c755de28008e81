"""A converted model's exported form taken down by ``torch.export``: one program, whichever file is made of it."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .dynamic_shapes import Specifications, check_windows, with_longer_axes
from .running_modules import running_modules
from .size_guards import SizeGuards, size_guards


class NotExportableError(RuntimeError):
    """A model, or an operation in it, has no ONNX form; the message says which."""


def exported_program(
    model: nn.Module,
    arguments: inspect.BoundArguments,
    dynamic_batch: bool,
    dynamic_shapes: Specifications | None = None,
    user_names: Mapping[str, str] | None = None,
) -> torch.export.ExportedProgram:
    """The program of a model in evaluation mode.

    Args:
        model: what to export.
        arguments: of its forward.
        dynamic_batch: whether the first axis, as long in every tensor as in the first one, is a batch of any size.
        dynamic_shapes: the axes of any size instead, by argument.
        user_names: the names that arguments have in the user's own forward, where they are others, for an error.

    Warns:
        UserWarning: the batch was to be of any size, and the model's code assumes the one of the arguments.

    Raises:
        NotExportableError: ``torch.export`` cannot take the model down.
        ValueError: the model's code assumes something of the size of an axis in ``dynamic_shapes``, or pools it
            adaptively.
    """
    with torch.no_grad(), quiet():
        if dynamic_shapes is not None:
            return _program_of_shapes(model, arguments, dynamic_shapes, user_names or {})
        try:
            return _program(model, *(_with_dynamic_batch(arguments) if dynamic_batch else (arguments, None)))
        except _FixedSizeError as error:
            code = error.guards.first or "the model"
            warnings.warn(
                f"the file takes the batch size of example_inputs only, because the code of {code} assumes it "
                "(with dynamic_batch=False there is no warning)",
                stacklevel=5,  # of the user's call of export_onnx
            )
            return _program(model, arguments, None)


def _program_of_shapes(
    model: nn.Module, arguments: inspect.BoundArguments, asked: Specifications, user_names: Mapping[str, str]
) -> torch.export.ExportedProgram:
    try:
        program = _program(model, with_longer_axes(arguments, asked), asked)
    except _FixedSizeError as error:
        reasons = error.guards.reasons(error.cause, user_names)
        raise ValueError(
            f"dynamic_shapes must be of axes that the model takes in any size, but {reasons}"
        ) from error.cause
    check_windows(program)
    return program


class _FixedSizeError(Exception):
    """A model's code does not go for all sizes of an axis."""

    def __init__(self, cause: Exception, guards: SizeGuards) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.guards = guards


def _with_dynamic_batch(arguments: inspect.BoundArguments) -> tuple[inspect.BoundArguments, dict[str, Any] | None]:
    """Arguments to export with, and which of their axes are of any size; None where there is no batch."""
    values: dict[str, Any] = dict(arguments.arguments)
    size = _batch_size(values)
    if size is None:
        return arguments, None
    if size == 1:  # an axis of length 1 is taken for a constant
        values = tree_map(lambda leaf: torch.cat([leaf, leaf]) if _has_batch(leaf, 1) else leaf, values)
        size = 2
    batch = torch.export.Dim("batch")
    shapes: dict[str, Any] = tree_map(lambda leaf: {0: batch} if _has_batch(leaf, size) else None, values)
    return inspect.BoundArguments(arguments.signature, OrderedDict(values)), shapes


def _batch_size(arguments: dict[str, Any]) -> int | None:
    """The length of the first tensor's first axis; None where there is no such tensor."""
    return next((leaf.shape[0] for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim()), None)


def _has_batch(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size


def _program(
    model: nn.Module, arguments: inspect.BoundArguments, shapes: dict[str, Any] | None
) -> torch.export.ExportedProgram:
    with running_modules(model) as running, size_guards(running) as guards:
        try:
            # What fails is said below; the graph so far, which torch prints, helps no one.
            with contextlib.redirect_stderr(io.StringIO()):
                return torch.export.export(model, arguments.args, arguments.kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # a model's own code may raise anything at a value that is not there
            if shapes is not None and "onstraints violated" in str(error):
                raise _FixedSizeError(error, guards) from error
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise NotExportableError(f"torch.export failed in {running.innermost}: {reason}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter says about itself."""
    # That torchvision is not installed (it need not be), and where in torch a value was needed that is not there.
    names = ("torch.onnx._internal.exporter._registration", "torch.fx.experimental.symbolic_shapes")
    loggers = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    for logger, _ in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # PyTorch's copy of its own tree specifications calls what it has deprecated.
            warnings.filterwarnings(
                "ignore", message=re.escape("`isinstance(treespec, LeafSpec)`"), category=FutureWarning
            )
            yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)
