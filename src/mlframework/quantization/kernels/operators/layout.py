"""How the elements of a tensor lie in memory, which the operators keep or choose."""

from __future__ import annotations

from torch import Tensor


def memory_order(input: Tensor) -> Tensor:
    """The elements as a vector in the order in which they lie: a view of any dense tensor, channels-last included."""
    if input.is_contiguous():
        return input.reshape(-1)
    return input.permute(_outermost_first(input)).reshape(-1)


def is_dense(input: Tensor) -> bool:
    """Whether the elements fill one block of memory, in any order of the dimensions."""
    return input.is_contiguous() or input.permute(_outermost_first(input)).is_contiguous()


def dense(input: Tensor) -> Tensor:
    """The tensor, copied if its elements do not fill one block of memory."""
    return input if is_dense(input) else input.clone()


def lie_alike(left: Tensor, right: Tensor) -> bool:
    """Whether two dense tensors have one shape and one order of their elements."""
    if left.shape != right.shape or not (is_dense(left) and is_dense(right)):
        return False
    strides = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in strides)


def laid_out_like(values: Tensor, input: Tensor) -> Tensor:
    """The values of a tensor of that shape in the order of the elements of a dense ``input``: itself, or a copy."""
    if values.stride() == input.stride():
        return values
    order = _outermost_first(input)
    back = sorted(range(len(order)), key=order.__getitem__)
    return values.permute(order).contiguous().permute(back)


def with_channels_last(values: Tensor) -> Tensor:
    """A tensor (N, C, *size) with axis 1 innermost in memory: itself, or a copy."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1)


def _outermost_first(input: Tensor) -> list[int]:
    return sorted(range(input.dim()), key=input.stride, reverse=True)
