"""Operations that have one form on float values and one on integer codes.

Training runs the first, evaluation and a converted model the second, an exported file states the first between
quantize and dequantize. What belongs together stands here once, and everything else speaks to the interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import arithmetic, kernels
from ..scheme import QuantizationScheme
from .instruction import Instruction, Settings

Ends = tuple[int | Tensor, int | Tensor]


class Grid(NamedTuple):
    """Where codes lie on the real line, per tensor: ``scale`` float32 and ``zero_point`` a code, both of no dimension,
    so that they leave the shape of whatever they meet as it is."""

    scale: Tensor
    zero_point: Tensor
    scheme: QuantizationScheme

    @classmethod
    def of(cls, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme) -> Grid:
        """From parameters of shape (1,)."""
        return cls(scale.reshape(()), zero_point.reshape(()), scheme)


class IntegerOperation(ABC):
    """An operation on float values, and the same on codes.

    Attributes:
        kind: what to call it in a report.
        clips: whether an activation that only clips can be had with it, as a choice of saturation.
        written_on_codes: the class's :meth:`on_codes`, as it was when the class was made.
    """

    kind: ClassVar[str]
    clips: ClassVar[bool] = False
    written_on_codes: ClassVar[Callable[..., Tensor]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.written_on_codes = cls.on_codes

    @abstractmethod
    def on_values(self, *values: Tensor) -> Tensor:
        """The operation on floats."""

    @abstractmethod
    def constants(self, inputs: Sequence[Grid], output: Grid) -> tuple[Tensor, ...]:
        """What the operation on codes takes to know of the grids."""

    @abstractmethod
    def on_codes(self, codes: Sequence[Tensor], constants: tuple[Tensor, ...], output: Grid, ends: Ends) -> Tensor:
        """Codes of the inputs' grids to codes of the output's, saturating at ``ends``."""

    @property
    def instruction_name(self) -> str | None:
        """What the operation is to the compiled kernels where they run it; None where they have no form of it."""
        return None

    def instruction(self, constants: tuple[Tensor, ...], output: Grid, ends: tuple[int, int]) -> Instruction | None:
        """The same, with what :meth:`on_codes` takes besides codes."""
        return None

    @classmethod
    def has_instruction(cls) -> bool:
        """As :meth:`.IntegerModule.has_instruction`."""
        return "instruction_name" in vars(cls) and cls.on_codes is cls.written_on_codes

    def settings(self) -> tuple[Settings, ...]:
        """The attributes that the instruction is made of."""
        return ()

    def modules(self) -> tuple[torch.nn.Module, ...]:
        """The user's own modules that :meth:`on_values` calls."""
        return ()

    def __str__(self) -> str:
        return self.kind


class Addition(IntegerOperation):
    """The sum of two tensors, as ONNX Runtime's ``QLinearAdd``; broadcasts.

    The operands of its formula stand in the order given, but for one that is constant along the last axis where the
    other is not: that one always stands second. Of two single values, the right one stands first.
    """

    kind = "sum"
    clips = True

    def on_values(self, *values: Tensor) -> Tensor:
        left, right = values
        return left + right

    def constants(self, inputs: Sequence[Grid], output: Grid) -> tuple[Tensor, ...]:
        left, right = ((grid.scale, grid.zero_point) for grid in inputs)
        given = arithmetic.add_constants(*left, *right, output.scale, output.zero_point)
        swapped = arithmetic.add_constants(*right, *left, output.scale, output.zero_point)
        return *given, *swapped

    def on_codes(self, codes: Sequence[Tensor], constants: tuple[Tensor, ...], output: Grid, ends: Ends) -> Tensor:
        left, right = codes
        if _is_constant_along_last_axis(left, right):
            left, right, constants = right, left, constants[3:]
        left_ratio, right_ratio, constant = constants[:3]
        return kernels.add(left, left_ratio, right, right_ratio, constant, *ends, output.scheme.dtype)

    @property
    def instruction_name(self) -> str | None:
        return "add"

    def instruction(self, constants: tuple[Tensor, ...], output: Grid, ends: tuple[int, int]) -> Instruction | None:
        return Instruction("add", constants, (*ends, output.scheme.dtype.is_signed))


def _is_constant_along_last_axis(left: Tensor, right: Tensor) -> bool:
    """Whether, along the last axis on which either is longer than 1, ``left`` is broadcast; so it is on none."""
    for axis in range(1, max(left.dim(), right.dim()) + 1):
        left_size = left.shape[-axis] if axis <= left.dim() else 1
        right_size = right.shape[-axis] if axis <= right.dim() else 1
        if left_size != 1 or right_size != 1:
            return left_size == 1
    return True


class Multiplication(IntegerOperation):
    """The product of two tensors, element by element, as ONNX Runtime's ``QLinearMul``; broadcasts."""

    kind = "product"
    clips = True

    def on_values(self, *values: Tensor) -> Tensor:
        left, right = values
        return left * right

    def constants(self, inputs: Sequence[Grid], output: Grid) -> tuple[Tensor, ...]:
        left, right = inputs
        ratio = arithmetic.multiply_ratio(left.scale, right.scale, output.scale)
        return left.zero_point.to(torch.float32), right.zero_point.to(torch.float32), ratio

    def on_codes(self, codes: Sequence[Tensor], constants: tuple[Tensor, ...], output: Grid, ends: Ends) -> Tensor:
        left_zero_point, right_zero_point, ratio = constants
        return arithmetic.multiply_codes(
            codes[0],
            left_zero_point,
            codes[1],
            right_zero_point,
            ratio,
            output.zero_point,
            *ends,
            output.scheme.dtype,
        )


class Concatenation(IntegerOperation):
    """Tensors side by side along one axis, each brought to the output's grid through a table, as ``QLinearConcat``."""

    kind = "concat"

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def on_values(self, *values: Tensor) -> Tensor:
        return torch.cat(values, self.dim)

    def constants(self, inputs: Sequence[Grid], output: Grid) -> tuple[Tensor, ...]:
        return tuple(arithmetic.lookup_table(None, *grid, *output) for grid in inputs)

    def on_codes(self, codes: Sequence[Tensor], constants: tuple[Tensor, ...], output: Grid, ends: Ends) -> Tensor:
        return torch.cat([kernels.lookup(part, table) for part, table in zip(codes, constants, strict=True)], self.dim)

    @property
    def instruction_name(self) -> str | None:
        return "concat"

    def instruction(self, constants: tuple[Tensor, ...], output: Grid, ends: tuple[int, int]) -> Instruction | None:
        return Instruction("concat", constants, (self.dim,))

    def settings(self) -> tuple[Settings, ...]:
        return (Settings(self, ("dim",)),)
