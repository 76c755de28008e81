"""Activation checkpointing: a forward that backward runs again computes with the state that it had the first time.

Statistics land when a model's forward ends, so by backward the scales have moved. A model whose training forward may be
run again therefore keeps what each commit replaced. Which forward a recomputation belongs to is told by the autograd
node that asks for it: nodes are numbered in the order in which they are made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor

from .. import kernels

State = dict[str, Tensor]

FORWARDS_KEPT = 64

_CANNOT_RECOMPUTE = (
    "cannot be recomputed with the scales that its forward had: train with checkpoints or with torch.compile, whose "
    "own partitioner recomputes what is cheap (torch._functorch.config.activation_memory_budget)"
)


def is_recomputing() -> bool:
    """Whether a backward pass is running, in which a forward only repeats an earlier one.

    Always False under ``torch.compile``, whose partitioner recomputes without calling modules.
    """
    return not kernels.is_traced() and torch._C._current_graph_task_id() != -1


@kernels.constant_in_graphs
def require_no_checkpoint() -> None:
    """Raises RuntimeError if ``torch.utils.checkpoint`` runs the forward that a compiler now traces."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    is_checkpoint = hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__
    if is_checkpoint or torch._C._current_graph_task_id() != -1:
        raise RuntimeError(f"torch.utils.checkpoint around a compiled model {_CANNOT_RECOMPUTE}")


def may_be_recomputed() -> bool:
    """Whether backward may run this part of a training forward again: what it saves is intercepted, or nothing is
    saved at all (the two kinds of ``torch.utils.checkpoint``)."""
    if kernels.is_traced():
        return False
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class ForwardHistory:
    """What the commits of the latest :data:`FORWARDS_KEPT` forwards replaced.

    Nothing is kept until a forward has been seen that may be recomputed. A recomputation of a forward older than those
    kept uses the oldest state there is.
    """

    def __init__(self) -> None:
        self.is_kept = False
        self.is_compiled = False  # whether the latest forward's statistics landed where torch.compile keeps nothing
        self._state = 0  # how many times it has been replaced
        self._recomputed = 0
        self._first_node = 0  # of the present forward
        self._last_node = 0  # when the one before ended
        self._replaced: deque[tuple[int, dict[int, State]]] = deque(maxlen=FORWARDS_KEPT)
        # From which autograd node on, in which state: in ascending order of nodes and of time.
        self._marks: deque[tuple[int, int]] = deque(maxlen=2 * FORWARDS_KEPT)

    def begin(self) -> None:
        """A forward begins."""
        self.is_compiled = False
        self._first_node = self._next_node()

    def end(self) -> None:
        """The forward has ended."""
        self._mark(self._first_node, self._state)
        self._last_node = torch._C._autograd._get_sequence_nr()

    def replace(self, replaced: dict[int, State]) -> None:
        """What the forward used, by index of the layer, is about to change."""
        if replaced:
            self._replaced.append((self._state, replaced))
            self._state += 1

    def state_of(self, index: int) -> State | None:
        """A layer's state in the forward that is being recomputed; None for the present one.

        Raises:
            RuntimeError: it is not known, since the model around what is recomputed is compiled.
        """
        if self.is_compiled:
            raise RuntimeError(f"torch.utils.checkpoint inside of a compiled model {_CANNOT_RECOMPUTE}")
        if not self.is_kept:
            return None
        used = self._state_used()
        return next((states[index] for state, states in self._replaced if state >= used and index in states), None)

    def _state_used(self) -> int:
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        self._recomputed = next((state for first, state in reversed(self._marks) if first <= number), self._recomputed)
        # What the recomputation makes belongs to the same forward: checkpoints may be nested.
        self._mark(self._next_node(), self._recomputed)
        self._last_node = torch._C._autograd._get_sequence_nr()
        return self._recomputed

    def _next_node(self) -> int:
        # Reentrant checkpoints make their nodes first and then run the forward without gradients.
        return torch._C._autograd._get_sequence_nr() if torch.is_grad_enabled() else self._last_node

    def _mark(self, node: int, state: int) -> None:
        last = self._marks[-1] if self._marks else (-1, -1)
        if node >= last[0] and state != last[1]:  # numbers are a thread's own, and lower ones another thread's
            self._marks.append((node, state))


class RecomputedLayer(Protocol):
    """A layer whose buffers a commit replaces."""

    _buffers: dict[str, Tensor | None]

    @property
    def state_when_recomputing(self) -> State | None:
        """What the buffers held in the forward that is being recomputed; None where they hold it still."""


@contextmanager
def as_in_forward(layers: Sequence[RecomputedLayer | None]) -> Iterator[None]:
    """Puts the buffers in place that the layers had in the forward that is being recomputed."""
    exchanged: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for layer in layers:
        state = None if layer is None else layer.state_when_recomputing
        if layer is not None and state is not None:
            exchanged.append((layer._buffers, {name: layer._buffers[name] for name in state}))
            layer._buffers.update(state)
    try:
        yield
    finally:
        for buffers, own in reversed(exchanged):
            buffers.update(own)
