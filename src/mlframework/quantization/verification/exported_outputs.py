"""What a file is run on, and what it gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class ExportedOutputs(NamedTuple):
    """What the layers give, by name (of one called several times, the last), and what the model returns (None where
    there is no file)."""

    layers: dict[str, Tensor]
    results: list[Tensor] | None


def tensors_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call, in the order of the model's signature."""
    return [leaf for leaf in leaves_of(model, args, kwargs) if isinstance(leaf, Tensor)]


def leaves_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The same with whatever is no tensor."""
    return tree_leaves(dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments))


def run_in_parts(
    run: Callable[[Sequence[Any]], list[Tensor]], values: list[Any], shapes: Sequence[tuple[int, ...] | None]
) -> list[Tensor]:
    """What a file gives that takes fixed shapes: of a larger batch, a part at a time.

    Args:
        run: runs the file once; raises a RuntimeError where it takes other shapes.
        values: what it is given.
        shapes: what it takes at the most; None for what is no tensor.

    Raises:
        ValueError: it takes other shapes.
    """
    found = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
    parts = _in_parts(values, shapes)
    if parts is None:  # of the file's shape, or of a smaller one that it may take as well
        try:
            return run(values)
        except RuntimeError as error:
            raise ValueError(
                f"batches must have the shapes that the file at path takes, {shapes}, or more of them along the first "
                f"axis, got {found}: {error}"
            ) from error
    results = list(map(run, parts))
    length = next(value.shape[0] for value in parts[0] if isinstance(value, Tensor))
    if any(value.dim() == 0 or value.shape[0] != length for result in results for value in result):
        raise ValueError(
            f"batches must have the shapes that the file at path takes, {shapes}, since its results have no batch to "
            f"be put together from parts along, got {found}"
        )
    return list(map(torch.cat, zip(*results, strict=True)))


def _in_parts(values: list[Any], shapes: Sequence[tuple[int, ...] | None]) -> list[list[Any]] | None:
    """The values in parts of the shapes that are taken; None where they have others."""
    if len(values) != len(shapes):
        return None
    counts = set()
    for value, shape in zip(values, shapes, strict=True):
        if shape is None:
            continue
        found = tuple(value.shape) if isinstance(value, Tensor) else ()
        if not shape or not found or found[1:] != shape[1:]:
            return None
        counts.add(divmod(found[0], shape[0]))
    if len(counts) != 1:
        return None
    ((count, rest),) = counts
    if rest or count < 2:
        return None
    split = [
        [value] * count if shape is None else list(value.split(shape[0]))
        for value, shape in zip(values, shapes, strict=True)
    ]
    return [list(part) for part in zip(*split, strict=True)]
