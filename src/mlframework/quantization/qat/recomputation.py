"""Activation checkpointing: a forward that backward runs again computes with the state that it had the first time.

Statistics land when a model's forward ends, so by backward the scales have moved. For as long as a checkpoint may run a
forward again, what commits have replaced since is therefore kept. A checkpoint is known by an object of PyTorch's own
that the autograd graph holds: the frame of one that intercepts what is saved, or the node of a reentrant one.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import _CheckpointFrame

from .. import kernels

State = dict[str, Tensor]


def is_recomputing() -> bool:
    """Whether a backward pass is running, in which a forward only repeats an earlier one.

    Always False under ``torch.compile``, whose partitioner recomputes without calling modules.
    """
    return not kernels.is_traced() and torch._C._current_graph_task_id() != -1


class ForwardHistory:
    """What the commits have replaced that came after forwards which a checkpoint may run again.

    Nothing is kept where there is no such checkpoint, and no longer than the graph that holds it.
    """

    def __init__(self) -> None:
        self.is_compiled = False  # whether the latest forward's statistics landed where torch.compile keeps nothing
        self._state = 0  # how many times it has been replaced
        self._replaced: deque[tuple[int, dict[int, State]]] = deque()
        # The state in which each checkpoint has run, and of reentrant ones those that will not run again.
        self._checkpoints: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._spent: weakref.WeakSet[object] = weakref.WeakSet()
        self._of_several: weakref.WeakSet[object] = weakref.WeakSet()  # forwards with a state each
        # Nodes of autograd are numbered: the next one when the latest forward ended, and when the forward did that gave
        # each layer its present state.
        self._last_node = 0
        self._changed_at: dict[int, int] = {}

    def begin(self) -> None:
        """A forward begins."""
        self.is_compiled = False
        for checkpoint in list(self._spent):
            self._checkpoints.pop(checkpoint, None)
        self._spent.clear()

    def observe(self) -> None:
        """Notes the state that a layer observes in, for the checkpoints that it runs in."""
        for checkpoint in _checkpoints():
            if self._checkpoints.get(checkpoint, self._state) != self._state:
                self._of_several.add(checkpoint)
            self._checkpoints[checkpoint] = self._state

    def end(self) -> None:
        """Notes where in autograd's order of nodes a forward has ended."""
        self._last_node = torch._C._autograd._get_sequence_nr()

    def replace(self, layers: Mapping[int, RecomputedLayer]) -> None:
        """What these layers have used in the forward, each by its index, is about to change."""
        if not layers:
            return
        oldest = min(self._checkpoints.values(), default=None)
        if oldest is None:
            self._replaced.clear()
        else:
            self._replaced.append((self._state, {index: layer.state for index, layer in layers.items()}))
            while self._replaced[0][0] < oldest:
                self._replaced.popleft()
        self._changed_at.update(dict.fromkeys(layers, self._last_node))
        self._state += 1

    def state_of(self, index: int) -> State | None:
        """A layer's state in the forward that is being recomputed; None for the present one.

        Raises:
            RuntimeError: it is not known.
        """
        if self.is_compiled:
            raise RuntimeError(f"torch.utils.checkpoint inside of a compiled model {kernels.CANNOT_RECOMPUTE}")
        running = next((each for each in _recomputed_checkpoints() if each in self._checkpoints), None)
        if running is None:
            self._require_unchanged(index)
            return None
        if running in self._of_several:
            raise RuntimeError(
                "torch.utils.checkpoint must be around one training forward of a model that observes, got several, "
                "which had scales of their own: give each a checkpoint of its own"
            )
        used = self._checkpoints[running]
        if isinstance(running, FunctionCtx) and not torch._C._autograd._get_current_graph_task_keep_graph():
            self._spent.add(running)
        self._checkpoints.update(dict.fromkeys(_checkpoints(), used))  # which may be nested
        return next((states[index] for state, states in self._replaced if state >= used and index in states), None)

    def _require_unchanged(self, index: int) -> None:
        """A forward that no checkpoint is known to have run (the layer was not observing then, say) has used the
        present state if it came after the last change."""
        changed_at = self._changed_at.get(index)
        node = torch._C._current_autograd_node()
        if changed_at is not None and (node is None or node._sequence_nr() < changed_at):
            raise RuntimeError(
                "a forward within backward must repeat a training forward that torch.utils.checkpoint ran, or the "
                "forward(ctx, ...) of an autograd.Function, got one whose scales have changed since and are not known"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardHistory, ()  # no checkpoint runs the forwards of a copy


def _checkpoints() -> list[object]:
    """What may run this part of a forward again: the checkpoints that intercept what is saved, innermost first, and,
    where nothing is recorded, autograd functions whose forward this is part of."""
    found = [each for each in map(_checkpoint_of, _all_hooks()) if each is not None]
    return found if torch.is_grad_enabled() else [*found, *_running_functions()]


def _recomputed_checkpoints() -> list[object]:
    """The checkpoints that may be running this part of a forward again."""
    node: object = torch._C._current_autograd_node()
    return [*_checkpoints(), *([node] if isinstance(node, FunctionCtx) else [])]


def _all_hooks() -> list[tuple[Any, Any]]:
    """The hooks on saved tensors that are in force, innermost first."""
    stack = []
    try:
        while (hooks := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            stack.append(hooks)
    finally:
        for hooks in reversed(stack):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
    return stack


def _checkpoint_of(hooks: tuple[Any, Any]) -> object | None:
    """The checkpoint that these hooks belong to, in its forward or in a recomputation."""
    pack = inspect.unwrap(hooks[0])
    if not inspect.isfunction(pack) or pack.__module__ != torch.utils.checkpoint.__name__:
        return None
    contents = [cell.cell_contents for cell in pack.__closure__ or ()]
    contents = [each() if isinstance(each, weakref.ref) else each for each in contents]
    return next((each for each in contents if isinstance(each, _CheckpointFrame)), None)


def _running_functions() -> Iterator[object]:
    """The nodes of ``torch.autograd.Function``s whose ``forward`` runs, innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, FunctionCtx):
                yield context
        frame = frame.f_back


class RecomputedLayer(Protocol):
    """A layer whose buffers a commit replaces."""

    _buffers: dict[str, Tensor | None]

    @property
    def state(self) -> State:
        """A copy of the buffers that a commit changes and a forward reads."""

    @property
    def state_when_recomputing(self) -> State | None:
        """What the buffers held in the forward that is being recomputed; None where they hold it still."""


@contextmanager
def as_in_forward(layers: Sequence[RecomputedLayer | None], *inputs: Any) -> Iterator[None]:
    """Puts the buffers in place that the layers had in the forward of these inputs that is being recomputed.

    Of empty inputs, which nothing observes, any state makes the same.
    """
    exchanged: list[tuple[dict[str, Any], dict[str, Any]]] = []
    is_empty = bool(inputs) and all(isinstance(input, Tensor) and input.numel() == 0 for input in inputs)
    try:
        for layer in () if is_empty else layers:
            state = None if layer is None else layer.state_when_recomputing
            if layer is not None and state is not None:
                exchanged.append((layer._buffers, {name: layer._buffers[name] for name in state}))
                layer._buffers.update(state)
        yield
    finally:
        for buffers, own in reversed(exchanged):
            buffers.update(own)
