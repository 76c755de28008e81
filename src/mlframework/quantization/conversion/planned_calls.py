"""When the programs of a converted model may run instead of its modules: where no hook, mode or tracer observes these,
and their code, state and settings are those that the programs were compiled from."""

from __future__ import annotations

import operator
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from ..graph.generated_forward import runs_generated_forward, source_of
from ..graph.hooks import all_calls_are_watched
from ..int8.instruction import Settings
from ..int8.integer_module import IntegerModule, PackedModule, last_change
from ..int8.integer_operation import IntegerOperation
from ..int8.program import Program, Recipe, compiled
from ..int8.views import settings_of_module

# Where a part keeps its plan, among its plain attributes.
_PLAN = "_plan_of_programs"


class Planned(NamedTuple):
    """What a part's flat graph calls.

    Attributes:
        programs: that it is given.
        containers: modules whose code runs as part of the graph, or that modules are reached through, by their names.
        modules: those that are called in a program.
        code: of the containers whose code runs as part of the graph, by their names.
    """

    programs: tuple[Recipe, ...]
    containers: tuple[str, ...]
    modules: tuple[str, ...]
    code: tuple[tuple[str, Any], ...]


def code_of(container: nn.Module) -> Any:
    """The code of a container's generated forward; None if it has none, or another one in the place of that."""
    return source_of(container).code if runs_generated_forward(container) else None


def programs_of(part: nn.Module) -> tuple[Program, ...] | None:
    """The programs of a part's flat graph, for the call under way; None where its modules are to be called."""
    if kernels.is_traced():
        pack_modules(part)
    if not kernels.run_programs() or all_calls_are_watched():
        return None
    plan: _Plan | None = vars(part).get(_PLAN)
    if plan is None or not plan.is_current(part):
        plan = vars(part)[_PLAN] = _Plan(part)
    return plan.programs if plan.programs is not None and plan.is_usable() else None


@kernels.constant_in_graphs
def pack_modules(part: nn.Module) -> None:
    """Makes the plans of a part's modules, which a compiler cannot while it traces them."""
    for module in part.modules():
        if isinstance(module, PackedModule):
            module.pack()


class _Plan:
    """The programs of a part, and what they depend on. Copies and pickles of the part are without it."""

    def __init__(self, part: nn.Module) -> None:
        planned: Planned = source_of(part).form
        self.programs: tuple[Program, ...] | None = None
        self._registries: list[dict[str, nn.Module | None]] = []
        try:
            containers = [part.get_submodule(name) for name in planned.containers]
            called = [part.get_submodule(name) for name in planned.modules]
        except AttributeError:  # what has taken the place of a container has other modules
            return
        for module in called:
            if isinstance(module, PackedModule):
                module.pack()
        self._last_change = last_change()
        self._integer_modules = [module for module in called if isinstance(module, IntegerModule)]
        self._changed = [module.changed for module in self._integer_modules]
        self._registries = [module._modules for module in containers]
        self._registries += [module._modules for module in self._integer_modules if module._modules]
        self._members = self._members_now()
        # Packed modules keep what they derive from their tensors up to date; the others read theirs in every call.
        self._read = [module._buffers for module in self._integer_modules if not isinstance(module, PackedModule)]
        self._tensors = self._tensors_now()
        self._tensors_read = [tensor for tensor in self._tensors if tensor is not None]
        self._formats = self._formats_now()
        settings = [each for module in called for each in _settings_of(module)]
        self._setting_owners = [vars(owner) for owner, names in settings for _ in names]
        self._setting_names = [name for _, names in settings for name in names]
        self._settings = [list(value) if isinstance(value, list) else value for value in self._settings_now()]
        self._objects = list(dict.fromkeys((*containers, *called, *(owner for owner, _ in settings))))
        self._classes = self._classes_now()
        self._distinct_classes = list(dict.fromkeys(self._classes))
        self._code_names = [
            "on_codes" if issubclass(kind, IntegerOperation) else "forward" for kind in self._distinct_classes
        ]
        self._code = self._code_now()
        watched = dict.fromkeys((*containers, *called))
        watched.pop(part, None)  # whose hooks see the call as a whole, whatever happens inside
        self._attributes = [vars(module) for module in watched]
        self._hooks = [
            hooks
            for module in watched
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        ]
        if any(code_of(part.get_submodule(name)) != code for name, code in planned.code):
            return
        programs = [compiled(recipe, part) for recipe in planned.programs]
        if all(program is not None for program in programs):
            self.programs = tuple(program for program in programs if program is not None)

    def is_current(self, part: nn.Module) -> bool:
        """Whether a part has the modules that the plan was made of, with the code, state and settings that they had."""
        if not self._registries or part._modules is not self._registries[0]:  # which a replica has of its own
            return False
        latest = last_change()
        if self._last_change != latest:  # of some integer module, perhaps of another model
            if [module.changed for module in self._integer_modules] != self._changed:
                return False
            self._last_change = latest
        return (
            self._members_now() == self._members
            and all(map(operator.is_, self._tensors_now(), self._tensors))
            and self._formats_now() == self._formats
            and self._settings_now() == self._settings
            and self._classes_now() == self._classes
            and self._code_now() == self._code
        )

    def is_usable(self) -> bool:
        """Whether nobody has put a hook or another forward on a module."""
        return not any(self._hooks) and not any(map(operator.contains, self._attributes, repeat("forward")))

    def _members_now(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self._registries)))

    def _tensors_now(self) -> list[Tensor | None]:
        return list(chain.from_iterable(map(dict.values, self._read)))

    def _formats_now(self) -> list[tuple[torch.dtype, bool]]:
        """What a tensor may get by way of ``data``, and programs do not read."""
        return [(tensor.dtype, tensor.is_cpu) for tensor in self._tensors_read]

    def _settings_now(self) -> list[Any]:
        return list(map(dict.get, self._setting_owners, self._setting_names))

    def _classes_now(self) -> list[type]:
        return list(map(type, self._objects))

    def _code_now(self) -> list[Any]:
        return list(map(getattr, self._distinct_classes, self._code_names))

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _settings_of(module: nn.Module) -> tuple[Settings, ...]:
    return module.settings() if isinstance(module, IntegerModule) else settings_of_module(module)
