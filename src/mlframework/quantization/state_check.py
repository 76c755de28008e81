"""A state dict is loaded whole or not at all: everything in it is checked before anything is copied.

PyTorch copies while it goes through the modules and raises at the end, which leaves a half-loaded model behind. So
loading is rehearsed first, by PyTorch's own code, on stand-ins that share everything with their modules but the
tensors: those have shapes and no values. What it finds (keys, shapes) and what the modules find wrong with the values
is raised before the load begins. The rehearsal goes on behind the model: what stands there in the module that is
loaded, and has its turn later, must fit as well.

A module that has something to say of its values does so in a method
``state_faults(state, prefix) -> Iterable[str]``, which is given the tensors that came for it, by their whole keys.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .load_call import Container, call_of

_LISTED = 5  # faults of values that an error lists

_HINT = (
    "Of quantization nodes: the float model's state_dict loads before prepare(), or with load_float_state_dict(), "
    "which leaves activations to calibrate(); the state_dict of a model with other nodes loads where prepare() was "
    "given the same configuration."
)

State = Mapping[str, Any]


def check_state(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Refuses a state that cannot be loaded whole into a module and what it holds: a load pre-hook.

    A model inside of another module is checked when its turn comes, with all that comes after it. What comes before it,
    the tensors of that module itself and of its first children, has been loaded by then. To have that checked too,
    register this function with the module that is loaded.

    Raises:
        RuntimeError: keys are missing or not expected (if the load is strict), a tensor is of another shape or of a
            dtype that does not go into the module's, or a module refuses its values.

    Example:
        >>> prepared = prepare(nn.Linear(4, 4), QATConfig(), (torch.randn(2, 4),))
        >>> container = nn.Sequential(nn.Linear(4, 4), prepared)
        >>> handle = container.register_load_state_dict_pre_hook(check_state)
        >>> state = {name: torch.zeros_like(value) for name, value in container.state_dict().items()}
        >>> container.load_state_dict(state)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        RuntimeError: Error(s) in loading state_dict for Sequential, of which nothing was loaded:
        ...
    """
    if _is_checked(error_msgs, prefix):
        return
    call = call_of(error_msgs, module, prefix)
    rehearsal = _Rehearsal(call.metadata, bool(local_metadata.get("assign_to_params_buffers", False)))
    for entries, found in zip(rehearsal.lists, (missing_keys, unexpected_keys, error_msgs), strict=True):
        entries += found if call.around else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the load itself warns
        rehearsal.load_first(module, rehearsal.without_values(state_dict), prefix, local_metadata)
        for container in call.around:
            rehearsal.load_rest(container)
    root = call.around[-1] if call.around else Container(module, state_dict, prefix, "")
    _note_checked(error_msgs, root.prefix)
    faults = rehearsal.report(call.strict)
    if faults:
        loaded = "nothing"
        if any(container.has_loaded for container in call.around):
            loaded = f"nothing but what comes before {prefix.removesuffix('.')}"
        name = type(root.module).__name__
        raise RuntimeError(
            "\n\t".join([f"Error(s) in loading state_dict for {name}, of which {loaded} was loaded:", *faults])
        )


def faults_where(
    state: State, key: str, own: Tensor, holds: Callable[[Tensor], Tensor], expected: str
) -> Iterator[str]:
    """The fault of a tensor, if it came and some of its values, in the dtype of the module's own, are not as expected.

    Args:
        state: of a module.
        key: of the tensor.
        own: the module's tensor of that name.
        holds: tells elementwise where they are.
        expected: what they must be, or do.
    """
    saved = state.get(key)
    if not isinstance(saved, Tensor) or saved.is_meta:
        return
    wrong = ~holds(saved.detach().to(own.dtype))
    if bool(wrong.any()):
        yield f"state_dict's {key} must {expected}, got {_listed(saved.detach()[wrong])}"


class _Rehearsal:
    """A load that copies nothing.

    Args:
        metadata: of the modules, by their paths.
        assigns: whether the load puts the state's tensors in the place of the modules'.
    """

    def __init__(self, metadata: Mapping[str, Any], assigns: bool) -> None:
        self.metadata = metadata
        self.assigns = assigns
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.errors: list[str] = []
        self.lists = (self.missing, self.unexpected, self.errors)
        self.faults: list[str] = []
        self.knows_keys = True
        self._saved: dict[int, tuple[Any, Any]] = {}  # by the id of what stands for it, which is kept with it
        self._empty: dict[int, Tensor] = {}  # what stands for a tensor, by the id of that

    def without_values(self, state: State) -> dict[str, Any]:
        """The state with tensors that have shapes alone; the real ones are remembered."""
        empty = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                if id(value) not in self._empty:
                    self._empty[id(value)] = _without_values(value)
                    self._saved[id(self._empty[id(value)])] = (self._empty[id(value)], value)
                empty[key] = self._empty[id(value)]
            else:
                empty[key] = value
        return empty

    def load_first(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        """Goes on from :func:`check_state`, before which a module's own way to load and some of its hooks may have had
        their turn."""
        stand_in = _stand_in(module)
        vars(stand_in)["_load_state_dict_pre_hooks"] = _hooks_after_check(module)
        own = type(module)._load_from_state_dict
        own_load = own if _is_ours(own) else nn.Module._load_from_state_dict
        self._load(module, stand_in, own_load, state, prefix, metadata, is_checked=True)

    def load_rest(self, container: Container) -> None:
        """The children of a module whose turn comes later."""
        state = self.without_values(container.state)
        for name in container.rest:
            self._load_child(container.module, name, state, container.prefix, is_checked=False)
        self.knows_keys &= _leaves_keys(container.module)

    def _load_child(
        self, module: nn.Module, name: str, state: dict[str, Any], prefix: str, *, is_checked: bool
    ) -> None:
        """What PyTorch does for a child and its children, which includes the modules' own ways to load."""
        child = module._modules[name]
        if child is not None:
            path = f"{prefix}{name}."
            own_state = {key: value for key, value in state.items() if key.startswith(path)}
            own_load = type(child)._load_from_state_dict
            is_checked = is_checked or has_check(child) or _is_ours(own_load)
            self._load(
                child, _stand_in(child), own_load, own_state, path, self._metadata_of(path), is_checked=is_checked
            )

    def _load(
        self,
        module: nn.Module,
        stand_in: nn.Module,
        own_load: Callable[..., None],
        state: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        *,
        is_checked: bool,
    ) -> None:
        """``is_checked``: beside what PyTorch checks, also dtypes, within the models that are loaded whole."""
        _note_checked(self.errors, "")
        if not is_checked and not all(_is_ours(hook) for hook in module._load_state_dict_pre_hooks.values()):
            # PyTorch calls a user's hook with the module itself, which has to wait for the load.
            self.knows_keys = False
            own_load = _loads_nothing
        before = [len(entries) for entries in self.lists]
        try:
            own_load(stand_in, state, prefix, metadata, True, *self.lists)
        except Exception:
            if not _has_foreign_code(module):
                raise
            # Code that needs values. It runs again in the load itself.
            self.knows_keys = False
            for entries, length in zip(self.lists, before, strict=True):
                del entries[length:]
        self.knows_keys &= _leaves_keys(module)
        if is_checked:
            self._check_values(module, state, prefix, self.errors[before[2] :])
        for name in module._modules:
            self._load_child(module, name, state, prefix, is_checked=is_checked)

    def report(self, strict: bool) -> list[str]:
        """What is wrong, a line each."""
        lines = []
        if strict and self.knows_keys:
            for kind, keys in (("Missing", self.missing), ("Unexpected", self.unexpected)):
                if keys:
                    listed = ", ".join(f'"{key}"' for key in keys)
                    lines.append(f"{kind} key(s) in state_dict: {listed}.")
            if any("fake_quantize." in key for key in (*self.missing, *self.unexpected)):
                lines.append(_HINT)
        wrong = [*self.faults, *self.errors]
        lines += wrong[:_LISTED]
        if len(wrong) > _LISTED:
            lines.append(f"and {len(wrong) - _LISTED} more")
        return lines

    def _metadata_of(self, prefix: str) -> dict[str, Any]:
        metadata = dict(self.metadata.get(prefix[:-1], {}))
        return {**metadata, "assign_to_params_buffers": True} if self.assigns else metadata

    def _check_values(self, module: nn.Module, state: State, prefix: str, errors: list[str]) -> None:
        """Dtypes, and what the module says; not of tensors that PyTorch has found something wrong with."""
        came = {}
        for key, value in state.items():
            if key.startswith(prefix) and "." not in key[len(prefix) :]:
                came[key] = self._saved[id(value)][1] if id(value) in self._saved else value
        own = {f"{prefix}{name}": tensor for name, tensor in (*module._parameters.items(), *module._buffers.items())}
        for key, tensor in own.items():
            if tensor is not None and any(f" {key}:" in error or f'"{key}"' in error for error in errors):
                came.pop(key, None)
        state_faults = getattr(type(module), "state_faults", None)
        former = getattr(type(module), "former_dtypes", {})
        for key, tensor in own.items():
            if tensor is not None and isinstance(came.get(key), Tensor):
                fault = None
                if self.assigns or came[key].dtype is not former.get(key[len(prefix) :]):
                    fault = _dtype_fault(tensor, came[key], state_faults is not None, self.assigns)
                if fault is not None:
                    self.faults.append(f"state_dict's {key} must be {fault}")
                    del came[key]
        if state_faults is not None:
            self.faults.extend(state_faults(module, came, prefix))


def _dtype_fault(own: Tensor, saved: Tensor, is_ours: bool, assigns: bool) -> str | None:
    """What a saved tensor must be, where it would lose what it says in the place of a module's own."""
    if _is_sharded(own) is not _is_sharded(saved):
        kind = "a DTensor, as in the model" if _is_sharded(own) else "a whole tensor, as in the model"
        return f"{kind} (torch.distributed.checkpoint.state_dict's set_model_state_dict makes it one), got the other"
    if own.is_floating_point() and (is_ours or isinstance(own, nn.Parameter)):
        if not saved.is_floating_point():
            return f"of a floating-point dtype, got {saved.dtype}"
        if is_ours and assigns and saved.dtype is not own.dtype:
            return f"of dtype {own.dtype} to be assigned, got {saved.dtype}"
    elif (is_ours and saved.dtype is not own.dtype) or (saved.is_complex() and not own.is_complex()):
        return f"of dtype {own.dtype}, got {saved.dtype}"
    elif not (own.is_floating_point() or own.is_complex() or assigns or saved.is_meta or saved.dtype is own.dtype):
        values = saved.detach()
        if bool((values.to(own.dtype).to(values.dtype) != values).any()):
            return f"values of dtype {own.dtype}, got {_listed(values)}"
    return None


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _stand_in(module: nn.Module) -> Any:
    """The module with tensors that have shapes alone."""
    stand_in: Any = object.__new__(type(module))
    vars(stand_in).update(vars(module))
    for registry in ("_parameters", "_buffers"):
        own: dict[str, Tensor | None] = vars(module)[registry]
        vars(stand_in)[registry] = {
            name: None if tensor is None else _without_values(tensor) for name, tensor in own.items()
        }
    vars(stand_in)["set_extra_state"] = lambda state: None
    return stand_in


def _without_values(tensor: Tensor) -> Tensor:
    if nn.parameter.is_lazy(tensor):
        return tensor
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def has_check(module: nn.Module) -> bool:
    """Whether :func:`check_state` is a load pre-hook of the module."""
    return len(_hooks_after_check(module)) < len(module._load_state_dict_pre_hooks)


def _hooks_after_check(module: nn.Module) -> dict[int, Any]:
    """The load pre-hooks of a module that run when :func:`check_state`, if it is one of them, has run."""
    hooks = module._load_state_dict_pre_hooks
    checks = [index for index, hook in enumerate(hooks.values()) if getattr(hook, "hook", hook) is check_state]
    return dict(list(hooks.items())[checks[0] + 1 :] if checks else hooks)


def _has_foreign_code(module: nn.Module) -> bool:
    """Whether a module loads by code that is neither PyTorch's for any module nor this library's."""
    if module._load_state_dict_pre_hooks:
        return True
    return type(module)._load_from_state_dict is not nn.Module._load_from_state_dict and not _is_ours(
        type(module)._load_from_state_dict
    )


def _loads_nothing(*arguments: Any) -> None: ...


def _leaves_keys(module: nn.Module) -> bool:
    """Whether no hook may change, when the module has been loaded, which keys are missing or not expected."""
    return all(_is_ours(hook) for hook in module._load_state_dict_post_hooks.values())


def _is_ours(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(f"{__package__}.")


# What the present load of a thread has checked already: its list of errors, and the prefix of the module that it began
# with. Children are checked with their parents.
_checked = threading.local()


def _is_checked(error_msgs: list[str], prefix: str) -> bool:
    return getattr(_checked, "errors", None) is error_msgs and prefix.startswith(_checked.prefix)


def _note_checked(error_msgs: list[str], prefix: str) -> None:
    _checked.errors, _checked.prefix = error_msgs, prefix


def _listed(values: Tensor) -> str:
    return f"{values.flatten()[:4].tolist()}{' and more' if values.numel() > 4 else ''}"
