"""Functions of one quantized tensor, element by element, as tables: 256 entries hold all that there is to compute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import arithmetic, kernels
from .instruction import Instruction
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
        with _without_hooks(self.used):
            return (arithmetic.lookup_table(self.function, *inputs[0], *output),)

    def on_codes(self, codes: Sequence[Tensor], constants: tuple[Tensor, ...], output: Grid, ends: Ends) -> Tensor:
        entries: Tensor = kernels.lookup(codes[0], constants[0])
        return entries

    @property
    def instruction_name(self) -> str | None:
        return "lookup"

    def instruction(self, constants: tuple[Tensor, ...], output: Grid, ends: tuple[int, int]) -> Instruction | None:
        return Instruction("lookup", constants)

    def values_and_slopes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The function and its derivative at float32 values of shape (N,)."""
        # Activation checkpointing intercepts what a forward saves; the graph of this function is none of the model's.
        own_graph = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
        with _without_hooks(self.used), own_graph, torch.inference_mode(False), torch.enable_grad():
            values = values.detach().clone().requires_grad_()
            results = arithmetic.function_values(self.function, values)
            if not results.requires_grad:  # a function of steps
                return results, torch.zeros_like(results)
            (slopes,) = torch.autograd.grad(results.sum(), values, materialize_grads=True)
        return results.detach(), slopes

    def modules(self) -> tuple[nn.Module, ...]:
        return self.used


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _without_hooks(modules: tuple[nn.Module, ...]) -> Iterator[None]:
    """Keeps a table that is being made from the hooks that watch values."""
    hooks = [
        (module, name, getattr(module, name))
        for module in modules
        for name in ("_forward_hooks", "_forward_pre_hooks")
        if getattr(module, name)
    ]
    for module, name, _ in hooks:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, watching in hooks:
            setattr(module, name, watching)
