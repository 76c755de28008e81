"""What a backend is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..epilogue import Epilogue
from ..products import Description, Product

# Integers up to here are float32 numbers.
EXACT_IN_FLOAT32 = 2**24


class Backend(Protocol):
    """A way to compute integer layers."""

    def takes(self, description: Description) -> bool:
        """Whether it computes such a layer, exactly, on this machine."""

    def layer(self, product: Product, epilogue: Epilogue) -> Callable[[Tensor], Tensor]:
        """The layer, packed: codes to codes or values."""


class SumsBackend(ABC):
    """One that computes sums, which PyTorch's operations go on with."""

    @abstractmethod
    def takes(self, description: Description) -> bool:
        """Whether it computes such sums, exactly, on this machine."""

    @abstractmethod
    def sums(self, product: Product) -> Callable[[Tensor], Tensor]:
        """Codes to exact sums: int32, or float32 where these are exact."""

    def layer(self, product: Product, epilogue: Epilogue) -> Callable[[Tensor], Tensor]:
        """Sums, then the epilogue."""
        sums_of, axis = self.sums(product), product.channel_axis
        bound = product.bound + int(epilogue.bias.to(torch.int64).abs().max())
        # Float sums that stay exact with the bias need not become integers first.
        float_bias = epilogue.bias.to(torch.float32) if bound < EXACT_IN_FLOAT32 else epilogue.bias

        def run(codes: Tensor) -> Tensor:
            sums = sums_of(codes)
            return epilogue(sums, float_bias if sums.is_floating_point() else epilogue.bias, axis)

        return run
