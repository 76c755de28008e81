"""What a state tensor of one number says, as Python knows it: read again when somebody else has changed the tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels

_PLAIN = (Tensor, nn.Buffer)


class HostValue:
    """The number in a tensor of shape (1,), without waiting for the tensor's device in every step.

    It is read when the tensor was replaced or changed in place since the last time, by whatever PyTorch counts as a
    change: not by ``.data.copy_()``, for which :meth:`read` has an argument. Where a tensor cannot be read (a compiler
    traces, a transform batches), what was read last counts.

    Attributes:
        known: what was read, or set, last.
    """

    def __init__(self, tensor: Tensor, known: float) -> None:
        self.set(tensor, known)

    def set(self, tensor: Tensor, known: float) -> None:
        """Takes over what the caller has just made of the tensor."""
        self.known = known
        if not kernels.is_traced():
            self._tensor: Tensor | None = tensor
            self._version = None if tensor.is_inference() else tensor._version

    def read(self, tensor: Tensor, *, anew: bool = False) -> float:
        """The tensor's number; ``anew`` reads it in any case."""
        if kernels.is_traced():
            return self.known
        if not anew and tensor is self._tensor and (self._version is None or tensor._version == self._version):
            return self.known
        if type(tensor) in _PLAIN and not tensor.is_meta and not torch._C._are_functorch_transforms_active():
            self.set(tensor, tensor.item())
        return self.known

    def __getstate__(self) -> dict[str, Any]:
        # The tensor of a copy counts its changes anew.
        return {"known": self.known, "_tensor": None, "_version": None}
