"""Integer modules in a row as one program, which the compiled kernels run in one call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from .instruction import Instruction
from .integer_module import IntegerModule
from .views import View, view_of_module

_CODES = (torch.uint8, torch.int8)
_VALUES = (torch.float32, torch.bfloat16)


class Step(NamedTuple):
    """What is computed, a module by its name in the model or a view, and the numbers of the values that it reads."""

    target: str | View
    reads: tuple[int, ...]


class Recipe(NamedTuple):
    """What a program computes.

    Attributes:
        inputs: how many tensors it is given, which are its first values.
        steps: each computes the next value.
        outputs: the numbers of the values that it returns.
    """

    inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]


class Program:
    """Computes what a recipe says, in one call where the inputs are those that the compiled kernels read.

    It holds what it needs of the modules (packed weights, tables, scales) as they are when it is made, and nothing that
    a call changes: threads may share it.

    Args:
        calls: what each step calls.
        instructions: what each step is to the compiled kernels.
    """

    def __init__(self, recipe: Recipe, calls: Sequence[Any], instructions: Sequence[Instruction]) -> None:
        self._recipe = recipe
        self._calls = calls
        read_as_values = {
            value
            for step, instruction in zip(recipe.steps, instructions, strict=True)
            if instruction.name == "quantize"
            for value in step.reads
        }
        self._dtypes = tuple(_VALUES if value in read_as_values else _CODES for value in range(recipe.inputs))
        self._number = kernels.make_program(
            recipe.inputs,
            [(instruction, step.reads) for step, instruction in zip(recipe.steps, instructions, strict=True)],
            recipe.outputs,
        )
        weakref.finalize(self, kernels.release_program, self._number).atexit = False

    def run(self, *inputs: Tensor) -> Any:
        """The output, or a list of them.

        Only for when the compiled kernels run (:func:`.kernels.run_programs`).
        """
        for value, dtypes in zip(inputs, self._dtypes, strict=True):
            if not kernels.is_plain(value) or value.dtype not in dtypes or value.requires_grad:
                return self._run_modules(inputs)
        outputs = kernels.run_program(inputs, self._number)
        return outputs[0] if len(outputs) == 1 else outputs

    def _run_modules(self, inputs: Sequence[Any]) -> Any:
        """The same, one module after the other."""
        values = list(inputs)
        for call, step in zip(self._calls, self._recipe.steps, strict=True):
            values.append(call(*(values[value] for value in step.reads)))
        outputs = [values[value] for value in self._recipe.outputs]
        return outputs[0] if len(outputs) == 1 else outputs


def compiled(recipe: Recipe, root: nn.Module) -> Program | None:
    """The program of a recipe of modules in ``root``, with their present state; None where the compiled kernels do not
    run all of them on this machine and device."""
    calls = [step.target if isinstance(step.target, View) else root.get_submodule(step.target) for step in recipe.steps]
    instructions = []
    for call in calls:
        instruction = _instruction(call)
        if instruction is None or not all(kernels.is_plain(tensor) for tensor in instruction.tensors):
            return None
        instructions.append(instruction)
    return Program(recipe, calls, instructions)


def _instruction(call: View | nn.Module) -> Instruction | None:
    if isinstance(call, IntegerModule):
        return call.instruction() if call.has_instruction() and call.instruction_name is not None else None
    view = call if isinstance(call, View) else view_of_module(call)
    return None if view is None else view.instruction()
