"""State of integer modules: tensors that keep their dtype, and what is derived from them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..parameters import QuantizationParameters
from ..precision import keep_float32
from ..scheme_state import check_schemes, register_scheme, save_schemes, without_schemes

Plan = TypeVar("Plan")


class IntegerModule(nn.Module):
    """Holds codes and scales; scales stay float32 when a model is cast, and only floats that leave it follow.

    Attributes:
        float_dtype: the dtype of the model around it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.float_dtype = torch.float32
        self._grids: list[str] = []

    def register_grid(self, name: str, parameters: QuantizationParameters | None) -> None:
        """Copies parameters to the buffers ``{name}scale`` (float32) and ``{name}zero_point`` (int32), and their scheme
        to ``{name}grid``."""
        scale = zero_point = None
        if parameters is not None:
            scale = parameters.scale.detach().to(torch.float32, copy=True)
            zero_point = parameters.zero_point.detach().to(torch.int32, copy=True)
        self.register_buffer(f"{name}scale", scale)
        self.register_buffer(f"{name}zero_point", zero_point)
        if parameters is not None:
            register_scheme(self, f"{name}grid", parameters.scheme)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerModule:
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype)).dtype
        return super()._apply(keep_float32(fn), recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_schemes(self, state_dict, prefix)
        super()._load_from_state_dict(without_schemes(self, state_dict, prefix), prefix, *args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_schemes(self, destination, prefix)


class PackedModule(IntegerModule, Generic[Plan]):
    """Derives a plan from its tensors: what a call needs, ready to run.

    The plan is made by :meth:`pack`, at the first call at the latest, and made anew when the tensors are loaded or
    moved. Tensors edited in place by other means go unseen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._plan: Plan | None = None

    def pack(self) -> Plan:
        """The plan, made where that is still to be done."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    @abstractmethod
    def _make_plan(self) -> Plan:
        """Derives the plan; may read values back from the device."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerModule:
        self._plan = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        packed = self._plan is not None
        self._plan = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        if packed:
            self.pack()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}
