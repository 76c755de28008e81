"""From a user's model to the program that a file is made of: what every format begins with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..conversion.convert import convert, unwrapped
from ..graph.clone import copy_of
from ..int8.integer_module import IntegerModule
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..targets import Conventions
from .dynamic_shapes import specifications
from .example_call import ExampleCall, run_example
from .export_model import make_export_model
from .file import check_writable
from .program import exported_program
from .targets import check_target, resolved_target


def check_arguments(
    model: Any,
    args: Any,
    kwargs: Any,
    target: str | None,
    file_format: str | None,
    path: str | os.PathLike[str] | None,
) -> None:
    """Refuses what can be refused before there is anything to write.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: an unknown target, or one whose files are of another format.
        OSError: the path cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(args, tuple):
        raise TypeError(f"example_inputs must be a tuple of arguments, got {type(args).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"example_kwargs must be a mapping from names to arguments, got {type(kwargs).__name__}")
    check_target(target, file_format)
    if path is not None:  # a program may stay in memory
        check_writable(path)


def converted_for(
    model: nn.Module, target: str | None, file_format: str | None, path: str | os.PathLike[str] | None = None
) -> tuple[nn.Module, str]:
    """The converted model, on the CPU and in evaluation mode, as a copy; and the engine that it is for.

    Raises:
        TypeError: the model is neither prepared nor converted.
        ValueError: the engine's grids are not the model's.
        RuntimeError: the model has seen no data.
    """
    if any(isinstance(module, FakeQuantizeLayer) for module in model.modules()):
        converted = convert(model)
    elif any(isinstance(module, IntegerModule) for module in model.modules()):
        converted = copy_of(unwrapped(model))
    else:
        raise TypeError(f"model must be prepared or converted, got a {type(model).__name__} without quantized layers")
    converted = converted.to("cpu").eval()
    suffix = None if path is None else os.path.splitext(os.fspath(path))[1]
    return converted, resolved_target(converted, target, file_format, suffix)


def program_of(
    converted: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    conventions: Conventions,
    dynamic_batch: bool,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
) -> tuple[torch.export.ExportedProgram, ExampleCall]:
    """The program of a converted model, which changes, and the example that it was taken down with.

    Raises:
        TypeError: the arguments do not fit the model's forward.
        ValueError: they do not run through it, or the model's code fixes an axis in ``dynamic_shapes``.
        NotExportableError: ``torch.export`` cannot take the model down.
    """
    example = run_example(converted, args, kwargs or {})
    names = example.user_names
    asked = None if dynamic_shapes is None else specifications(dynamic_shapes, example.arguments, names)
    if dynamic_batch or asked is not None:
        conventions = replace(conventions, flattens_images=False)
    exportable = make_export_model(converted, conventions, example.shapes).eval()
    return exported_program(exportable, example.arguments, dynamic_batch, asked, names), example
