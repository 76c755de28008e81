"""Axes of any size that the user names, as ``torch.export.export`` takes them.

They are checked before anything is traced, made longer where the example has a length that would be taken for a
constant, and given the user's names in the file.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .example_call import ExampleCall

# What is asked of each argument, by the name that it has in the exported model's forward.
Specifications = dict[str, Any]


_ATEN = torch.ops.aten
_ADAPTIVE_AVERAGES = {
    _ATEN.adaptive_avg_pool1d.default,
    _ATEN.adaptive_avg_pool2d.default,
    _ATEN.adaptive_avg_pool3d.default,
}
_ADAPTIVE = _ADAPTIVE_AVERAGES | {
    _ATEN.adaptive_max_pool1d.default,
    _ATEN.adaptive_max_pool2d.default,
    _ATEN.adaptive_max_pool3d.default,
}


class _Axes(NamedTuple):
    """Of one tensor: where it is among the arguments, and what is asked of its axes."""

    path: str
    tensor: Tensor
    dims: dict[int, Any]


def specifications(
    dynamic_shapes: Any, arguments: inspect.BoundArguments, user_names: Mapping[str, str]
) -> Specifications:
    """What is asked of each argument, by the name that it has in the exported model's forward.

    Args:
        dynamic_shapes: a mapping from names of arguments, or a sequence with an entry for each.
        arguments: of the example.
        user_names: the names that arguments have in the user's own forward, where they are others.

    Raises:
        TypeError: it is neither, or says of a tensor what is no mapping from axes.
        ValueError: it names arguments or axes that there are not.
    """
    if isinstance(dynamic_shapes, Mapping):
        known = {user_names.get(name, name): name for name in arguments.arguments}
        for name in dynamic_shapes:
            if name not in known:
                raise ValueError(
                    f"dynamic_shapes must name arguments of example_inputs ({', '.join(known)}), got {name!r}"
                )
        asked = {name: dynamic_shapes.get(own) for own, name in known.items()}
    elif isinstance(dynamic_shapes, Sequence) and not isinstance(dynamic_shapes, str):
        count = len(arguments.args) + len(arguments.kwargs)
        if len(dynamic_shapes) != count:
            raise ValueError(
                f"dynamic_shapes must have an entry for each of the {count} arguments, got {len(dynamic_shapes)}"
            )
        keywords = dict(zip(arguments.kwargs, dynamic_shapes[len(arguments.args) :], strict=True))
        asked = dict(arguments.signature.bind(*dynamic_shapes[: len(arguments.args)], **keywords).arguments)
    else:
        raise TypeError(
            f"dynamic_shapes must be a dict by argument name or a tuple, got {type(dynamic_shapes).__name__}"
        )
    if not any(axes.dims for axes in _asked_axes(asked, arguments)):
        raise ValueError(f"dynamic_shapes must name an axis of any size, got {dynamic_shapes!r}")
    return asked


def with_longer_axes(arguments: inspect.BoundArguments, asked: Specifications) -> inspect.BoundArguments:
    """The example with values twice along axes of any size that are of length 1, which torch.export takes for fixed."""
    longer: dict[int, Tensor] = {}
    for axes in _asked_axes(asked, arguments):
        tensor = axes.tensor
        for axis in axes.dims:
            if tensor.shape[axis] == 1:
                tensor = torch.cat([tensor, tensor], axis)
        longer[id(axes.tensor)] = tensor
    values = tree_map(lambda leaf: longer.get(id(leaf), leaf), dict(arguments.arguments))
    return inspect.BoundArguments(arguments.signature, OrderedDict(values))


def symbol_names(program: torch.export.ExportedProgram, example: ExampleCall, dynamic_shapes: Any) -> dict[str, str]:
    """What the user calls the sizes of a program: by name of a ``Dim``; else by the argument and the axis."""
    asked = specifications(dynamic_shapes, example.arguments, example.user_names)
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    tensors = [value for value in values if isinstance(value, Tensor)]
    names: dict[str, str] = {}
    for axes, value in zip(_asked_axes(asked, example.arguments), tensors, strict=True):
        for axis, dim in axes.dims.items():
            size = value.shape[axis]
            if isinstance(size, torch.SymInt):
                root = getattr(dim, "root", dim)  # of a multiple of another Dim, that one
                name = getattr(root, "__name__", None) or f"{axes.path}_{axis}"
                for symbol in size.node.expr.free_symbols:
                    names.setdefault(str(symbol), name)
    return names


def check_windows(program: torch.export.ExportedProgram) -> None:
    """Refuses adaptive pooling of axes of any size, whose windows torch.onnx writes for the example's size alone.

    Raises:
        ValueError: there is one, other than the average over everything; the message names its module.
    """
    for node in program.graph.nodes:
        if node.target not in _ADAPTIVE:
            continue
        outputs = list(node.args[1]) if isinstance(node.args[1], Sequence) else [node.args[1]]
        sizes = node.args[0].meta["val"].shape[-len(outputs) :]
        is_mean = node.target in _ADAPTIVE_AVERAGES and set(outputs) == {1}
        if not is_mean and any(isinstance(size, torch.SymInt) for size in sizes):
            owners = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
            raise ValueError(
                f"dynamic_shapes must not leave open what adaptive pooling to {tuple(outputs)} divides into windows, "
                f"as they do in {owners[-1] if owners else 'the model itself'}"
            )


def _asked_axes(asked: Specifications, arguments: inspect.BoundArguments) -> list[_Axes]:
    """For every tensor among the arguments, in order, its axes of any size."""
    return [axes for name, value in arguments.arguments.items() for axes in _axes_of(name, value, asked.get(name))]


def _axes_of(path: str, value: Any, asked: Any) -> Iterator[_Axes]:
    if isinstance(value, Tensor):
        yield _Axes(path, value, dict(_dims_of(path, value, asked)))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _axes_of(f"{path}_{key}", item, None if asked is None else asked[key])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from _axes_of(f"{path}_{index}", item, None if asked is None else asked[index])


def _dims_of(path: str, tensor: Tensor, asked: Any) -> Iterator[tuple[int, Any]]:
    if isinstance(asked, Sequence) and not isinstance(asked, str):
        if len(asked) != tensor.dim():
            raise ValueError(
                f"dynamic_shapes must have an entry for each of the {tensor.dim()} axes of {path!r}, got {len(asked)}"
            )
        asked = dict(enumerate(asked))
    elif asked is not None and not isinstance(asked, Mapping):
        raise TypeError(
            f"dynamic_shapes must have for the tensor {path!r} a dict from axes to torch.export.Dim, got {asked!r}"
        )
    for axis, dim in (asked or {}).items():
        if axis not in range(tensor.dim()):
            raise ValueError(f"dynamic_shapes must name axes of {path!r}, which has {tensor.dim()}, got {axis!r}")
        if dim is not None and not isinstance(dim, int) and dim != torch.export.Dim.STATIC:
            yield axis, dim
