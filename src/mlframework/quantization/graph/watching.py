"""Runs a model's own code and notes, module by module, what it does beside computing values.

A graph of calls says how values are computed. What else a module's code does is lost in it: another gradient or
autocast mode, custom backward functions, checkpointing, random draws, attributes and buffers that it writes, lists of
arguments that it changes. Of modules that do such things, the code itself has to run.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from .example_run import requiring_grad
from .padded_positions import without_fused_encoders
from .random_draws import RANDOM_FUNCTIONS, draws_outside_torch
from .values import tensors_of, with_tensors

PATCHED = "its forward was replaced on the instance"

_MODULE_CALL = nn.Module.__call__


class ModuleCall(NamedTuple):
    """A call of a module as it was: values apart from any autograd graph."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


@dataclass
class Observation:
    """What a run of a model has shown.

    Attributes:
        calls: of every module by name, in order.
        callees: the modules that a container's code calls itself, by the container's name.
        effects: what the code of a container does beside computing values, by the container's name.
        changing: the containers whose code changes a list or dictionary that it is given.
        writing: the containers whose code changes a tensor that it is given.
        failed: the modules that were running when the model raised an error, the innermost last; of a part that was
            not reached, the part.
        result: what the model returned.
        error: that it raised.
    """

    calls: dict[str, list[ModuleCall]] = field(default_factory=dict)
    callees: dict[str, dict[str, None]] = field(default_factory=dict)
    effects: dict[str, str] = field(default_factory=dict)
    changing: set[str] = field(default_factory=set)
    writing: set[str] = field(default_factory=set)
    failed: tuple[str, ...] = ()
    result: Any = None
    error: Exception | None = None

    def of(self, name: str) -> Observation:
        """What it has shown of a part of the model, by names inside of that."""

        def inside(names: Mapping[str, Any]) -> dict[str, Any]:
            return {key[len(name) :].removeprefix("."): value for key, value in names.items() if is_inside(key, name)}

        callees = {key: inside(value) for key, value in inside(self.callees).items()}
        calls = inside(self.calls)
        changing, writing = (set(inside(dict.fromkeys(each))) for each in (self.changing, self.writing))
        failed = tuple(each[len(name) :].removeprefix(".") for each in self.failed if is_inside(each, name))
        if name and "" not in calls:  # it was not reached, or not left
            return Observation(calls, callees, inside(self.effects), changing, writing, failed or ("",))
        result = calls[""][0].result if name else self.result
        return Observation(calls, callees, inside(self.effects), changing, writing, failed, result, self.error)


def is_inside(name: str, outer: str) -> bool:
    """Whether a module of that name is, or is inside of, another."""
    return not outer or name == outer or name.startswith(f"{outer}.")


@dataclass
class _Frame:
    """A container whose code runs."""

    name: str
    module: nn.Module
    modes: tuple[Any, ...]
    state: dict[str, Any]
    lists: list[Any]


def observe(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_leaf: Callable[[nn.Module], bool]
) -> Observation:
    """Runs the model, in the mode that it is in and with gradients, as its own code says.

    The run leaves its traces in the model: give it a copy. An error that the model raises ends the run and is noted.

    Args:
        model: to be run.
        args, kwargs: example inputs.
        is_leaf: modules whose inside is of no concern.
    """
    watch = _Watch(model, is_leaf)
    with torch.enable_grad(), without_fused_encoders(), warnings.catch_warnings(), watch.watching():
        warnings.simplefilter("ignore")  # what it has to say, it says when it is called in earnest
        try:
            # Without the hooks of the model itself, which are no part of what it computes.
            result = watch._run_code("", model, requiring_grad(args), requiring_grad(dict(kwargs)))
            watch.observation.result = _detached(result)
        except Exception as error:  # a model's own code may raise anything in a mode that the example is not for
            watch.observation.error = error
            watch.observation.failed = watch.failed
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            effect = f"it raises an error {watch.mode} with the example inputs ({reason})"
            watch.observation.effects.setdefault(watch.failed[-1], effect)
    watch.notice_hidden_changes()
    return watch.observation


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.model = model
        self.mode = "in training" if model.training else "in evaluation"
        self.is_leaf = is_leaf
        self.names = {module: name for name, module in model.named_modules()}
        self.frames: list[_Frame] = []
        self.leaves = 0  # that are running
        self.raised: BaseException | None = None  # last, and the containers that were running
        self.failed: tuple[str, ...] = ()
        self.observation = Observation()
        self.draws = draws_outside_torch()
        self.recorded: set[Any] = set()  # by autograd
        self.weights = {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()}
        self.containers = [module for module in self.names if not is_leaf(module)]
        self.states = {module: _state_of(module) for module in self.containers}

    def notice(self, effect: str) -> None:
        """Keeps the first effect found in the innermost container's code."""
        self.observation.effects.setdefault(self.frames[-1].name, effect)

    # --- what happens inside of a container's code ----------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.frames and not self.leaves:
            self._check_modes()
            if func is torch._C._set_grad_enabled:
                self.notice(_MODES[0])
            if self._writes(func, args, kwargs or {}):
                self.notice("it writes to weights")
            # What training alone draws, its trace shows.
            if func in RANDOM_FUNCTIONS and not self.model.training:
                self.notice("it draws random numbers")
        return func(*args, **(kwargs or {}))

    def _writes(self, function: Any, args: Any, kwargs: Any) -> bool:
        """Whether a function changes a parameter in place, or through what shares its memory."""
        name = getattr(function, "__name__", "")
        changes = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")
        changed = kwargs.get("out", args[0] if args and changes else None)
        return isinstance(changed, Tensor) and changed.data_ptr() in self.weights

    def _check_modes(self) -> None:
        before, now = self.frames[-1].modes, _modes()
        if before != now:
            self.notice(next(what for what, a, b in zip(_MODES, before, now, strict=True) if a != b))

    def _check_draws(self) -> None:
        """Of Python's and NumPy's generators, whose functions are not PyTorch's to watch."""
        now = draws_outside_torch()
        if now != self.draws:
            self.notice("it draws random numbers")
            self.draws = now

    def _check_functions(self, result: Any, *, are_own: bool) -> None:
        """Looks for custom functions in what autograd has recorded since the last look."""
        pending = [tensor.grad_fn for tensor in tensors_of(result)]
        while pending:
            function = pending.pop()
            if function is None or function in self.recorded:
                continue
            self.recorded.add(function)
            pending.extend(each for each, _ in function.next_functions)
            is_custom = isinstance(function, BackwardCFunction) and type(function).__name__ != _OF_HOOKS
            if are_own and is_custom:
                # Whose forward runs without gradients, which has been noticed before.
                self.observation.effects[self.frames[-1].name] = "it calls an autograd.Function"

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = self.names.get(module)
        if name is None or self.leaves:
            return _MODULE_CALL(module, *args, **kwargs)
        if self.frames:
            self._check_modes()
            self._check_draws()
            self._check_functions((args, kwargs), are_own=True)
            self.observation.callees.setdefault(self.frames[-1].name, {})[name] = None
        given = _detached(args), _detached(kwargs)
        if self.is_leaf(module):
            self.leaves += 1
            try:
                result = _MODULE_CALL(module, *args, **kwargs)
            finally:
                self.leaves -= 1
            self.draws = draws_outside_torch()
            self._check_functions(result, are_own=False)
        else:
            result = self._call_container(name, module, args, kwargs)
        self.observation.calls.setdefault(name, []).append(ModuleCall(*given, _detached(result)))
        return result

    def _call_container(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        own = vars(module).get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:  # without the hooks around it
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own
            paused, self.leaves = self.leaves, 0
            try:
                return self._run_code(name, module, args, kwargs)
            finally:
                self.leaves = paused

        module.__dict__["forward"] = forward
        self.leaves += 1
        try:
            result = _MODULE_CALL(module, *args, **kwargs)
        finally:
            self.leaves -= 1
        self.draws = draws_outside_torch()
        return result

    def _run_code(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        lists = [(each, _contents(each)) for each in _lists(args, kwargs)]
        frame = _Frame(name, module, _modes(), _state_of(module), lists)
        self.frames.append(frame)
        try:
            return self._run_in(frame, module, args, kwargs)
        except BaseException as error:  # which code around may catch
            if error is not self.raised:
                self.raised, self.failed = error, tuple(each.name for each in self.frames)
            raise
        finally:
            self.frames.pop()

    def _run_in(self, frame: _Frame, module: nn.Module, args: Any, kwargs: Any) -> Any:
        versions = [(tensor, tensor._version) for tensor in tensors_of((args, kwargs))]
        if "forward" in vars(module):
            self.notice(PATCHED)
        result = module.forward(*args, **kwargs)
        self._check_draws()
        self._check_functions(result, are_own=True)
        changed = _first_change(frame.state, _state_of(module))
        if changed is not None:
            self.notice(f"it changes {changed}")
        if any(_differs(_contents(each), before) for each, before in frame.lists):
            self.observation.changing.add(frame.name)
        if any(tensor._version != version for tensor, version in versions):
            self.observation.writing.add(frame.name)
        self.states[module] = _state_of(module)
        return result

    def notice_hidden_changes(self) -> None:
        """What changed a module's state outside of its own code was some module's around it: all of these."""
        for module in self.containers:
            changed = _first_change(self.states[module], _state_of(module))
            if changed is None:
                continue
            name = self.names[module]
            around = [other for other in self.names.values() if is_inside(name, other)]
            for other in around:
                self.observation.effects.setdefault(
                    other, f"{changed} of {name or 'the model'} is changed from outside"
                )

    @contextmanager
    def watching(self) -> Iterator[None]:
        watch = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return watch._call(module, *args, **kwargs)

        def setting(module: nn.Module, name: str, value: Any) -> None:
            if watch.frames and not watch.leaves and module in watch.names and name != "training":
                watch.notice(f"it sets {_named(watch.frames[-1], module, watch.names, name)}")
            set_attribute(module, name, value)

        def hooking(register: Any) -> Any:
            def registering(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if watch.frames and not watch.leaves:
                    watch.notice("it puts hooks on modules")
                return register(module, *args, **kwargs)

            return registering

        def entering(autocast: torch.autocast) -> Any:
            if watch.frames and not watch.leaves:
                watch.notice(_MODES[2])
            return enter(autocast)  # type: ignore[no-untyped-call]

        def asking(owner: Any, name: str, effect: str) -> None:
            function = getattr(owner, name)

            def ask(*args: Any, **kwargs: Any) -> Any:
                if watch.frames and not watch.leaves:
                    watch.notice(effect)
                return function(*args, **kwargs)

            patched.append((owner, name, function))
            setattr(owner, name, ask)

        patched: list[tuple[Any, str, Any]] = []
        for name in ("is_autocast_enabled", "is_grad_enabled", "is_inference_mode_enabled"):
            asking(torch, name, "it asks for the gradient or autocast mode")
        for name in ("grad", "backward"):
            asking(torch.autograd, name, "it computes gradients")
        set_attribute = nn.Module.__setattr__
        enter = torch.autocast.__enter__
        replaced: dict[str, Any] = {"__call__": call, "__setattr__": setting}
        for name in ("register_forward_hook", "register_forward_pre_hook"):
            replaced[name] = hooking(getattr(nn.Module, name))
        own = {name: nn.Module.__dict__[name] for name in replaced}
        for name, function in replaced.items():
            setattr(nn.Module, name, function)
        try:
            torch.autocast.__enter__ = entering  # type: ignore[method-assign]
            with self:
                yield
        finally:
            for owner, name, function in patched:
                setattr(owner, name, function)
            torch.autocast.__enter__ = enter  # type: ignore[method-assign]
            for name, function in own.items():
                setattr(nn.Module, name, function)


# Which are others while a model is watched.
_is_autocast_enabled = torch.is_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled
_is_inference_mode_enabled = torch.is_inference_mode_enabled
_OF_HOOKS = "BackwardHookFunctionBackward"  # of PyTorch, around modules that have backward hooks
_MODES = (
    "it changes the gradient mode",
    "it changes the inference mode",
    "it changes the autocast state",
    "it has hooks on the tensors that autograd saves",
)


def _modes() -> tuple[Any, ...]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    autocast = [(_is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    return (
        _is_grad_enabled(),
        _is_inference_mode_enabled(),
        (autocast, torch.is_autocast_cache_enabled()),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


def _detached(values: Any) -> Any:
    return with_tensors(values, Tensor.detach)


def _state_of(module: nn.Module) -> dict[str, Any]:
    """What a module holds itself: attributes, buffers and parameters, in a form that tells of changes."""
    held = {name: value for name, value in vars(module).items() if not name.endswith("_hooks") and name != "training"}
    state = {name: _contents(value) for name, value in held.items() if name not in ("_buffers", "_parameters")}
    for registry in (module._buffers, module._parameters):
        state.update({name: _contents(value) for name, value in registry.items()})
    return state


_LARGEST = 10_000  # objects looked at in one attribute


def _contents(value: Any) -> tuple[Any, ...]:
    """An object with all that is in it now, which is compared by identity."""
    found: list[Any] = []
    pending, seen = [value], set()
    while pending and len(found) < _LARGEST:
        each = pending.pop()
        found.append(each)
        if isinstance(each, Tensor):
            found += [each._version, each.data_ptr() if each.layout is torch.strided else 0]
            continue
        if id(each) in seen or isinstance(each, (nn.Module, type, ModuleType, FunctionType)):
            continue
        seen.add(id(each))
        if isinstance(each, dict):
            pending += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple, set, frozenset, deque)):
            pending += each
        elif hasattr(each, "__dict__"):
            pending += vars(each).values()
    return tuple(found)


def _differs(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) != len(other) or any(
        a is not b and not (isinstance(a, int) and isinstance(b, int) and a == b)
        for a, b in zip(one, other, strict=True)
    )


def _first_change(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    return next((name for name in {**before, **after} if _differs(before.get(name, ()), after.get(name, ()))), None)


def _lists(args: Any, kwargs: Any) -> list[Any]:
    """The lists and dictionaries among arguments, those inside of others too."""
    found, pending = [], [*args, *kwargs.values()]
    while pending:
        value = pending.pop()
        if isinstance(value, (list, dict)):
            found.append(value)
        if isinstance(value, (list, tuple)):
            pending.extend(value)
        elif isinstance(value, dict):
            pending.extend(value.values())
    return found


def _named(frame: _Frame, module: nn.Module, names: Mapping[nn.Module, str], attribute: str) -> str:
    return attribute if module is frame.module else f"{attribute} of {names[module] or 'the model'}"
