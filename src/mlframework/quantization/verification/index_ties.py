"""Indices of equal values: of two that are equally the largest, every engine picks the one that it likes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten

# Operators that return indices along a dimension, with the position of the indices among the results (None where they
# are the only one) and of the dimension among the arguments.
_INDEX_OPERATORS: dict[Any, tuple[int | None, int]] = {
    _ATEN.argmax.default: (None, 1),
    _ATEN.argmin.default: (None, 1),
    _ATEN.max.dim: (1, 1),
    _ATEN.min.dim: (1, 1),
    _ATEN.topk.default: (1, 2),
    _ATEN.sort.default: (1, 1),
    _ATEN.sort.stable: (1, 2),
    _ATEN.argsort.stable: (None, 2),
}
_LAST = -1  # the dimension by default
_REDUCING = {_ATEN.argmax.default, _ATEN.argmin.default}  # by default over all values


class _Choice(NamedTuple):
    """What an operator returned as indices, with the values that it chose from.

    Attributes:
        indices: as they were returned.
        chosen: a copy, with the dimension that was searched last.
        values: likewise.
        dim: that dimension; None where all values were searched.
    """

    indices: Tensor
    chosen: Tensor
    values: Tensor
    dim: int | None


class IndexTies:
    """Finds out which of the indices that a model returns may as well be others.

    Args:
        model: in evaluation mode; it is run again, with the operators watched that return indices.
        args, kwargs: of the call.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with _Watching() as watching:
            result = model(*args, **kwargs)
        self._choices = watching.choices
        self._results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

    def between(self, position: int, one: Tensor, other: Tensor) -> Tensor | None:
        """Where two forms of the model return different indices of equal values.

        Args:
            position: of the tensor among the model's results.
            one: what the model returned there.
            other: what another form of it returned, of the same shape.

        Returns:
            A mask of that shape; None where the result is not known to be indices.
        """
        result = self._results[position]
        choice = next((choice for choice in reversed(self._choices) if _is_same_storage(choice.indices, result)), None)
        if choice is None or not torch.equal(one, result):
            return None
        chosen, others = (
            _searched_last(indices.to(torch.int64).reshape(choice.indices.shape), choice.dim, choice.values.dim())
            for indices in (one, other)
        )
        if not torch.equal(chosen, choice.chosen) or not _are_indices(others, choice.values.shape[-1]):
            return None
        ties: Tensor = choice.values.gather(-1, others) == choice.values.gather(-1, chosen)
        ties = ties & (others != chosen)
        if choice.dim is not None and choice.indices.dim() == ties.dim():
            ties = ties.movedim(-1, choice.dim)
        return ties.reshape(other.shape)


class _Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what operators returned as indices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.choices: list[_Choice] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _INDEX_OPERATORS:
            self.choices.append(_choice(func, args, kwargs, result))
        return result


def _choice(function: Any, args: Any, kwargs: Any, result: Any) -> _Choice:
    part, position = _INDEX_OPERATORS[function]
    indices: Tensor = result if part is None else result[part]
    values: Tensor = args[0].detach().clone()  # the model may go on to change it in place
    dim = args[position] if len(args) > position else kwargs.get("dim", None if function in _REDUCING else _LAST)
    if dim is None or values.dim() == 0:
        dim, values = None, values.flatten()
    else:
        values = values.movedim(dim, -1)
    return _Choice(indices, _searched_last(indices, dim, values.dim()).clone(), values, dim)


def _searched_last(indices: Tensor, dim: int | None, dimensions: int) -> Tensor:
    """Indices with the dimension that was searched last, whether they keep it or not."""
    if dim is None:
        return indices.reshape(1)
    return indices.movedim(dim, -1) if indices.dim() == dimensions else indices.unsqueeze(-1)


def _are_indices(indices: Tensor, length: int) -> bool:
    """Whether they are indices of that many values, each of which can be chosen once."""
    ordered = indices.sort(-1).values
    return not bool((indices < 0).any() | (indices >= length).any() | (ordered[..., 1:] == ordered[..., :-1]).any())


def _is_same_storage(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor is another, or the same values reshaped."""
    if one.dtype is not other.dtype or one.numel() != other.numel() or one.data_ptr() != other.data_ptr():
        return False
    same = one.shape == other.shape and one.stride() == other.stride()
    return one.numel() > 0 and (same or (one.is_contiguous() and other.is_contiguous()))
