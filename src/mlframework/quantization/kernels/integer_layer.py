r"""Integer products with what follows them: codes in, codes (or floats) out, in one step where a backend has one.

A product (:mod:`.products`) gives exact sums. :class:`.Epilogue` says what becomes of them,

.. math:: q_y = \mathrm{rne}(\mathrm{clamp}((a + b)\, m,\ q_{low} - z,\ q_{high} - z)) + z
   \qquad\text{or}\qquad y = \mathrm{clamp}((a + b)\, m,\ low,\ high),

and :class:`IntegerLayer` does both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .devices import Kernels, kernels_on
from .epilogue import Epilogue
from .plan import plan
from .products import Product


class IntegerLayer:
    """A product and its epilogue, on the backend that :mod:`.plan` chooses for them.

    The choice holds for as long as the product lies where it is; with references forced, there is one of its own.

    Raises:
        OverflowError: a sum may exceed int32.
    """

    def __init__(self, product: Product, epilogue: Epilogue) -> None:
        self.product = product
        self.epilogue = epilogue
        self.bound = product.bound + int(epilogue.bias.to(torch.int64).abs().max())
        if self.bound >= 2**31:
            raise OverflowError(f"sums of a weight of shape {tuple(product.weight.shape)} may exceed int32")
        self._runs: dict[Kernels | None, Callable[[Tensor], Tensor]] = {}
        self.pack()

    def pack(self) -> Callable[[Tensor], Tensor]:
        """What computes the layer now, made where that is still to be done."""
        selection = kernels_on(self.product.weight.device.type, self.product.weight.get_device())
        if selection not in self._runs:
            self._runs[selection] = plan(self.product.description).layer(self.product, self.epilogue)
        return self._runs[selection]

    @property
    def packed(self) -> Tensor | None:
        """The layer as the compiled kernels have it, where they run it."""
        packed: Tensor | None = getattr(self.pack(), "packed", None)
        return packed

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes to codes, or to float32 values."""
        return self.pack()(codes)
