"""What a ``load_state_dict`` in progress was asked, and how far it has come: PyTorch tells its hooks little of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn


class Container(NamedTuple):
    """A module that is being loaded, whose own tensors and some of whose children have been."""

    module: nn.Module
    state: Mapping[str, Any]
    prefix: str
    present: str  # the name of the child that is being loaded

    @property
    def rest(self) -> list[str]:
        """The names of the children whose turn comes later."""
        names = list(self.module._modules)
        return names[names.index(self.present) + 1 :]

    @property
    def has_loaded(self) -> bool:
        """Whether something of the state has been loaded already."""
        own = (*self.module._parameters, *self.module._buffers)
        before = tuple(
            f"{self.prefix}{name}." for name in self.module._modules if name not in (self.present, *self.rest)
        )
        return any(f"{self.prefix}{name}" in self.state for name in own) or any(
            key.startswith(before) for key in self.state
        )


class Call(NamedTuple):
    """What ``load_state_dict`` was asked, as far as hooks are not told, and the modules around, from inside out."""

    strict: bool
    metadata: Mapping[str, Any]
    around: list[Container]


# The function within load_state_dict that loads a module and then its children.
_LOAD = next(
    (each for each in nn.Module.load_state_dict.__code__.co_consts if getattr(each, "co_name", "") == "load"), None
)
_NOT_CHECKED = f"load_state_dict of PyTorch {torch.__version__} is not one that can be checked"


def call_of(error_msgs: list[str], module: nn.Module, prefix: str) -> Call:
    """The call that this list of errors belongs to, at the module whose hook runs.

    PyTorch tells hooks ``strict=True`` in any case, and a module nothing of its children's versions or of the modules
    around it: all are variables of ``load_state_dict``. Where some other code loads, keys, and what is around, are left
    to it.
    """
    if _LOAD is None:
        raise RuntimeError(_NOT_CHECKED)
    frame: FrameType | None = inspect.currentframe()
    around: list[Container] = []
    while frame is not None:
        if frame.f_code is _LOAD and frame.f_locals.get("error_msgs") is error_msgs:
            loaded, path = frame.f_locals.get("module"), frame.f_locals.get("prefix")
            if isinstance(loaded, nn.Module) and isinstance(path, str) and loaded is not module:
                child = prefix[len(path) :].partition(".")[0]
                if prefix.startswith(path) and child in loaded._modules:
                    around.append(Container(loaded, frame.f_locals.get("local_state_dict", {}), path, child))
        elif frame.f_code.co_name == "load_state_dict":
            if frame.f_locals.get("error_msgs") is error_msgs:
                return Call(bool(frame.f_locals["strict"]), frame.f_locals.get("metadata") or {}, around)
            if frame.f_code is nn.Module.load_state_dict.__code__ and "error_msgs" not in frame.f_locals:
                raise RuntimeError(_NOT_CHECKED)
        frame = frame.f_back
    return Call(False, {}, [])
