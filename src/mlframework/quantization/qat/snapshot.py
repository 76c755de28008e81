"""The value of a small state tensor at this moment, for backward to see."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library, register_fake

# Under torch.compile, backward would rather copy the state anew than keep a copy, and so read what forward has
# updated since (autograd then refuses). An operator that the partitioner does not know, it keeps.
_LIBRARY = Library("mlframework_quantization", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("snapshot(Tensor state) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("snapshot", torch.clone, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
register_fake("mlframework_quantization::snapshot", torch.empty_like, lib=_LIBRARY)


def snapshot(state: Tensor) -> Tensor:
    """A copy that stays as it is when ``state`` is updated in place before backward has run."""
    if torch.compiler.is_compiling():
        copied: Tensor = torch.ops.mlframework_quantization.snapshot(state)
        return copied
    return state.clone()
