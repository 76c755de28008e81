"""State of integer modules: tensors that keep their dtype, and what is derived from them."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..parameters import QuantizationParameters
from ..precision import keep_float32
from ..scheme_state import grid_faults, register_scheme, save_schemes, without_schemes
from ..state_check import check_state
from .instruction import Instruction, Settings

Plan = TypeVar("Plan")

_changes = itertools.count(1)
_last_change = 0


def last_change() -> int:
    """A number that is another one after any integer module noticed a change (see :attr:`IntegerModule.changed`).

    It does not see what goes past the module's own methods: tensors changed in place or through ``data``, writes to its
    ``__dict__``, ``_buffers`` or ``_modules``, changes inside of what its attributes refer to (a pooling module, an
    operation), another class, and functions replaced on a class.
    """
    return _last_change


class IntegerModule(nn.Module):
    """Holds codes and scales; scales stay float32 when a model is cast, and only floats that leave it follow.

    Attributes:
        float_dtype: the dtype of the model around it.
        changed: a number that is another one after its tensors were loaded, moved or replaced, or an attribute was set.
            What is made of the module's state, and kept elsewhere, is out of date then.
        written_forward: the class's forward, as it was when the class was made.
    """

    changed: int
    written_forward: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.written_forward = cls.forward

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
        applied: IntegerModule = super()._apply(keep_float32(fn), recurse)  # type: ignore[no-untyped-call]
        self._note_change()
        return applied

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_state(self, state_dict, prefix, *args)
        super()._load_from_state_dict(without_schemes(self, state_dict, prefix, args[2]), prefix, *args)
        self._note_change()

    def state_faults(self, state: Mapping[str, Any], prefix: str) -> Iterable[str]:
        """Grids, scales and zero points."""
        return grid_faults(self, state, prefix)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "training":  # which makes no difference to what an integer module computes
            self._note_change()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._note_change()

    def _note_change(self) -> None:
        global _last_change
        change = next(_changes)
        vars(self)["changed"] = change  # first: a thread that reads the new last change looks here next
        _last_change = change

    @property
    def instruction_name(self) -> str | None:
        """What the module is to the compiled kernels where they run it; None where they have no form of it."""
        return None

    def instruction(self) -> Instruction | None:
        """The same with the module's present state; None where the kernels do not run it on this machine or device."""
        return None

    @classmethod
    def has_instruction(cls) -> bool:
        """Whether instances may run as the instruction that they name: the class itself says so, and its forward is the
        one that it was made with. A derived class may compute something else, so that it has to say so again."""
        return "instruction_name" in vars(cls) and cls.forward is cls.written_forward

    def settings(self) -> tuple[Settings, ...]:
        """What the instruction is made of besides the module's own attributes."""
        return ()

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
        """The plan, made where that is still to be done.

        Raises:
            RuntimeError: it is, and the tensors only stand for others, while ``torch.export`` traces.
        """
        if self._plan is None:
            if any(isinstance(tensor, FakeTensor) for tensor in self.buffers(recurse=False)):
                raise RuntimeError(
                    f"{type(self).__name__} must have been called once, since it was loaded, before it is exported"
                )
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
        if packed and self._has_values:
            self.pack()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Now, since a compiler cannot while it traces the first call.
        if self._has_values:
            self.pack()

    @property
    def _has_values(self) -> bool:
        return not any(tensor.is_meta for tensor in self.buffers(recurse=False))
