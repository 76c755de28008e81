"""Functions of one quantized tensor, element by element, as tables: 256 entries hold all that there is to compute."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import arithmetic
from .integer_operation import Ends, Grid, IntegerOperation


class Lookup(IntegerOperation):
    """A function of each element on its own: an activation, a product with a number, or several such in a row.

    Args:
        function: module that maps a tensor to one of the same shape, element by element, and has no state.
        used: the user's own modules that ``function`` calls.
    """

    kind = "lookup"

    def __init__(self, function: nn.Module, used: tuple[nn.Module, ...] = ()) -> None:
        self.function = function
        self.used = used

    def on_values(self, *values: Tensor) -> Tensor:
        result: Tensor = self.function(*values)
        return result

    def constants(self, inputs: Sequence[Grid], output: Grid) -> tuple[Tensor, ...]:
        return (arithmetic.lookup_table(self.function, *inputs[0], *output),)

    def on_codes(self, codes: Sequence[Tensor], constants: tuple[Tensor, ...], output: Grid, ends: Ends) -> Tensor:
        return arithmetic.look_up(codes[0], constants[0])

    def modules(self) -> tuple[nn.Module, ...]:
        return self.used
