"""The example that an export goes by: does it fit the model, what are its values called, what does it meet inside?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map_only

from ..graph.example_run import copies, state_kept
from ..int8.integer_module import IntegerModule
from .running_modules import running_modules


@dataclass
class ExampleCall:
    """What is known from a run.

    Attributes:
        arguments: of the model's forward, on the CPU.
        input_names: of the tensors among them.
        output_names: of the tensors returned.
        shapes: what each integer module was given.
        user_names: of arguments, in the user's own forward, where the model's has others.
    """

    arguments: inspect.BoundArguments
    input_names: list[str]
    output_names: list[str]
    shapes: dict[IntegerModule, list[torch.Size]]
    user_names: dict[str, str]


def run_example(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExampleCall:
    """Runs the example through a converted model.

    Raises:
        TypeError: the arguments do not fit the forward's signature.
        ValueError: they do not run through the model; the message names the layer that failed.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"example_inputs and example_kwargs must fit the model's forward{signature}: {error}") from None
    # ExecuTorch's programs read inputs in the memory format of the example.
    bound.arguments = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().contiguous(), bound.arguments)
    with running_modules(model) as running, _recorded_shapes(model) as shapes, state_kept(model):
        try:
            result = model(*copies(bound.args), **copies(bound.kwargs))
        except Exception as error:
            given = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(bound.arguments)]
            raise ValueError(
                f"example_inputs must run through the model, got {given}, which fails in {running.innermost}: {error}"
            ) from error
    names = _argument_names(model)
    inputs = _names_of_tensors({names.get(name, name): value for name, value in bound.arguments.items()})
    outputs = _names_of_tensors(result, "output", inputs)
    if not outputs:
        raise ValueError("model must return tensors, got none from example_inputs")
    return ExampleCall(bound, inputs, outputs, shapes, names)


@contextmanager
def _recorded_shapes(model: nn.Module) -> Iterator[dict[IntegerModule, list[torch.Size]]]:
    """Fills a dictionary with the shapes of what each integer module is given, call after call."""
    shapes: dict[IntegerModule, list[torch.Size]] = {}

    def record(module: IntegerModule, args: tuple[Any, ...]) -> None:
        shapes.setdefault(module, []).append(args[0].shape)

    handles = [
        module.register_forward_pre_hook(record) for module in model.modules() if isinstance(module, IntegerModule)
    ]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()


def _argument_names(model: nn.Module) -> dict[str, str]:
    """A generated forward's arguments, by the names that they have in the user's own (``input`` becomes
    ``input_1``)."""
    base = getattr(type(model), "_base_of_generated", None)
    if base is None:
        return {}
    own = set(inspect.signature(base.forward).parameters)
    stems = {name: re.sub(r"_\d+$", "", name) for name in inspect.signature(model.forward).parameters}
    return {name: stem for name, stem in stems.items() if name not in own and stem in own}


def _names_of_tensors(tree: Any, default: str = "", taken: Collection[str] = ()) -> list[str]:
    """One for each tensor: the keys and attributes that lead to it, after ``default`` where those are but numbers."""
    names: list[str] = []
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if not isinstance(leaf, Tensor):
            continue
        keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        if all(key.isdigit() for key in keys):
            keys = [default, *keys]
        name = "_".join(keys)
        while name in taken or name in names:
            name += "_out"
        names.append(name)
    return names
