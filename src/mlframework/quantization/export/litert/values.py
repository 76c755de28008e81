"""The values of a program, in a file that keeps channels last: where each lies, in which order, on which grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..node_places import place_of
from ..program import NotExportableError
from .flat_model import FlatModel, Grid

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A value of the program.

    Attributes:
        shape: as the program has it.
        dtype: of what lies in memory.
        axes: those of the program in the order in which they lie in memory; a permutation.
        tensor: its number in the file; None for a constant that is not in the file yet.
        data: of a constant, in the program's order.
        grid: of codes; to the program they are the floats that they stand for. Its axis is one of the program's.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: Axes
    tensor: int | None = None
    data: Tensor | None = None
    grid: Grid | None = None

    @property
    def lies(self) -> tuple[int, ...]:
        """The shape in memory."""
        return tuple(self.shape[axis] for axis in self.axes)


def in_order(rank: int) -> Axes:
    """Axes that lie in the program's own order."""
    return tuple(range(rank))


def channels_last(rank: int) -> Axes:
    """Of (N, C, *size): N, the size, and C."""
    return (0, *range(2, rank), 1)


def without(axes: Axes, dim: int) -> Axes:
    """The order of the others where one axis goes."""
    return tuple(axis - (axis > dim) for axis in axes if axis != dim)


def constant(data: Tensor, grid: Grid | None = None) -> Value:
    """A value that is known when the file is written."""
    return Value(tuple(data.shape), data.dtype, in_order(data.dim()), data=data, grid=grid)


def constant_like(value: Value, data: Tensor) -> Value:
    """Another constant of the same kind."""
    return dataclasses.replace(value, shape=tuple(data.shape), axes=in_order(data.dim()), tensor=None, data=data)


class Values:
    """The values of a program so far, and the file that computes them.

    Args:
        model: the file.
    """

    def __init__(self, model: FlatModel) -> None:
        self.model = model
        self.parts: dict[fx.Node, list[Value]] = {}  # of nodes with several results
        self._of: dict[fx.Node, Value] = {}
        # By tensor, and never by value: one tensor is several values where a permutation is pending.
        self._arranged: dict[tuple[int, Axes], int] = {}  # and the order that its axes are brought to
        self._floats: dict[int, int] = {}
        self._reshaped: dict[int, Value] = {}
        self._written: dict[tuple[object, ...], Value] = {}  # by the constant's address and form
        self._kept: list[Tensor] = []  # whose addresses are not to be used again
        self.node: fx.Node | None = None  # the one that is being written

    def __contains__(self, node: object) -> bool:
        return node in self._of

    def __setitem__(self, node: fx.Node, value: Value) -> None:
        self._of[node] = value

    def __getitem__(self, argument: Any) -> Value:
        """The value of an argument of a node: another node, or a number.

        Raises:
            NotExportableError: it is neither; sizes that are computed are none.
        """
        if isinstance(argument, fx.Node):
            if argument not in self._of:
                raise self.refusal(f"{argument.name} is no tensor of a fixed size")
            return self._of[argument]
        if isinstance(argument, bool | int | float):
            return constant(torch.tensor(float(argument)))
        raise self.refusal(f"an argument is {argument!r}")

    def known(self, node: fx.Node) -> Tensor | None:
        """What a node stands for where that is a constant, and no codes."""
        value = self._of.get(node)
        return value.data if value is not None and value.grid is None else None

    def floats(self, argument: Any) -> Value:
        """The same, dequantized where it is codes."""
        value = self[argument]
        if value.grid is None:
            return value
        if value.tensor is None:
            assert value.data is not None
            return constant(_dequantized(value.data, value.grid))
        floats = dataclasses.replace(value, dtype=torch.float32, grid=None)
        if value.tensor in self._floats:
            return dataclasses.replace(floats, tensor=self._floats[value.tensor])
        floats = self._add(floats, "dequantized")
        self._floats[value.tensor] = _number(floats)
        return self.operator("DEQUANTIZE", [value], floats)

    def new(
        self,
        shape: Sequence[int],
        axes: Axes | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        grid: Grid | None = None,
    ) -> Value:
        """A value that an operator is to compute, named after the node that is being written."""
        axes = in_order(len(shape)) if axes is None else axes
        value = Value(tuple(shape), torch.int8 if grid is not None else dtype, axes, grid=grid)
        return self._add(value, self.node.name if self.node is not None else "input")

    def like(self, value: Value, shape: Sequence[int] | None = None, axes: Axes | None = None) -> Value:
        """One of the same kind, in another shape."""
        shape = value.shape if shape is None else shape
        axes = (value.axes if len(shape) == len(value.shape) else in_order(len(shape))) if axes is None else axes
        return self.new(shape, axes, dtype=value.dtype, grid=value.grid)

    def operator(self, name: str, inputs: Sequence[Value], output: Value, options: Any = None) -> Value:
        """Adds an operator; its output. Constants are written in the order that they have."""
        written = [self.written(value) for value in inputs]
        assert output.tensor is not None
        origin = "" if self.node is None else place_of(self.node)
        self.model.operator(name, [_number(value) for value in written], [output.tensor], options, origin)
        return output

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """The value in another dtype."""
        if value.dtype is dtype:
            return value
        if value.data is not None:
            return constant(value.data.to(dtype))
        return self.operator("CAST", [value], self.new(value.shape, value.axes, dtype=dtype))

    def arranged(self, value: Value, axes: Axes) -> Value:
        """The value with its axes in this order in memory."""
        if value.axes == axes:
            return value
        if value.tensor is None:
            return dataclasses.replace(value, axes=axes)
        order = tuple(value.axes.index(axis) for axis in axes)
        known = self._arranged.get((value.tensor, order))
        if known is not None:
            return dataclasses.replace(value, axes=axes, tensor=known)
        arranged = self.like(value, axes=axes)
        self._arranged[value.tensor, order] = _number(arranged)
        if _without_ones(value) == _without_ones(arranged):
            return self.reshape(value, arranged)
        return self.operator("TRANSPOSE", [value, integers(order)], arranged, self.model.options("TransposeOptions"))

    def reshape(self, value: Value, output: Value) -> Value:
        """The same memory in another shape."""
        assert output.tensor is not None
        value = self.reshaped_from(value) or value
        self._reshaped[output.tensor] = value
        options = self.model.options("ReshapeOptions", newShape=list(output.lies))
        return self.operator("RESHAPE", [value, integers(output.lies)], output, options)

    def reshaped_from(self, value: Value) -> Value | None:
        """What has the same memory in the shape that it had before ``RESHAPE``; its axes may lie in another order."""
        return None if value.tensor is None else self._reshaped.get(value.tensor)

    def written(self, value: Value) -> Value:
        """The value in the file: a constant gets its tensor."""
        if value.tensor is not None:
            return value
        assert value.data is not None
        key = value.data.data_ptr(), value.data.stride(), value.shape, value.dtype, value.axes, value.grid
        known = self._written.get(key) if value.data.numel() else None
        if known is not None:
            return known
        grid = value.grid
        if grid is not None:
            grid = grid._replace(axis=value.axes.index(grid.axis) if value.axes else 0)
        name = self.node.name if self.node is not None else "constant"
        data = value.data.permute(value.axes)
        self._kept.append(value.data)
        tensor = self._tensor(f"{name}_constant", value, grid, data)
        self._written[key] = dataclasses.replace(value, tensor=tensor)
        return self._written[key]

    def refusal(self, reason: str) -> NotExportableError:
        """An error that names the node that is being written."""
        place = place_of(self.node) if self.node is not None else "the model"
        return NotExportableError(f"LiteRT has no form of {place}: {reason}")

    def _add(self, value: Value, name: str) -> Value:
        grid = value.grid
        if grid is not None and len(grid.scale) > 1:
            grid = grid._replace(axis=value.axes.index(grid.axis))
        return dataclasses.replace(value, tensor=self._tensor(name, value, grid))

    def _tensor(self, name: str, value: Value, grid: Grid | None, data: Tensor | None = None) -> int:
        try:
            return self.model.tensor(name, value.lies, value.dtype, grid, data)
        except KeyError:
            raise self.refusal(f"tensors of {value.dtype} have no form in its files") from None


def integers(numbers: Sequence[int]) -> Value:
    """A constant that tells an operator shapes or axes."""
    return constant(torch.tensor(list(numbers), dtype=torch.int32))


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names in its operator's schema, with what it has by default."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return {
        argument.name: given.get(argument.name, argument.default_value)
        for argument in node.target._schema.arguments  # type: ignore[union-attr]
    }


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a node computes."""
    return tuple(int(size) for size in node.meta["val"].shape)


def _number(value: Value) -> int:
    assert value.tensor is not None
    return value.tensor


def _without_ones(value: Value) -> list[int]:
    return [axis for axis in value.axes if value.shape[axis] != 1]


def _dequantized(codes: Tensor, grid: Grid) -> Tensor:
    shape = [1] * codes.dim()
    if len(grid.scale) > 1:
        shape[grid.axis] = -1
    scale, zero_point = (torch.tensor(part).reshape(shape if codes.dim() else ()) for part in grid[:2])
    return (codes.to(torch.int32) - zero_point).to(torch.float32) * scale.to(torch.float32)
