"""The value of a small state tensor at this moment, for backward to see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..devices import is_traced
from .declaration import operator


# Under torch.compile, backward would rather copy the state anew than keep a copy, and so read what forward has
# updated since (autograd then refuses). An operator that the partitioner does not know, it keeps.
@operator("snapshot(Tensor state) -> Tensor", ())
def _snapshot(state: Tensor) -> Tensor:
    return state.clone()


@_snapshot.fake
def _(state: Tensor) -> Tensor:
    return torch.empty_like(state)


def snapshot(state: Tensor) -> Tensor:
    """A copy that stays as it is when ``state`` is updated in place before backward has run."""
    if is_traced():
        copied: Tensor = _snapshot.overload(state)
        return copied
    return state.clone()
