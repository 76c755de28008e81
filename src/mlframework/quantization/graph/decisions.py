"""Answers what a model's code asks of shapes and types while it is traced, from the example, and guards the answers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from .example_run import copies
from .nodes import owner_of

# What tells of a tensor's form and not of its values.
_FORM_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"}
_FORM_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex",
                 "is_contiguous", "get_device", "element_size"}  # fmt: skip
_FORM_FUNCTIONS: set[Any] = {torch.is_floating_point, torch.is_complex, torch.numel, len}

# What makes as many parts as an axis is long.
_PARTS_BY_SIZE: set[Any] = {torch.unbind, torch.split, torch.tensor_split, "unbind", "split", "tensor_split"}

_MODULE_CALL, _MODULE_GETATTR = nn.Module.__call__, nn.Module.__getattr__  # a trace replaces both


_IS_GUARD = "guards a decision"


class Undecided(Exception):
    """The answer depends on a tensor's values."""


class ExampleAnswers:
    """The values that a graph's nodes have on the example, computed as far as someone asks.

    Args:
        model: the model that is being traced.
        graph: its graph, which grows meanwhile.
        arguments: the example, by the names of the placeholders.
        stack: the modules whose code is being traced, as nodes have them in ``meta["nn_module_stack"]``.
    """

    def __init__(
        self, model: nn.Module, graph: fx.Graph, arguments: dict[str, Any], stack: Callable[[], dict[str, Any]]
    ) -> None:
        self.model = model
        self.stack = stack
        self.graph = graph
        self.arguments = arguments
        self.interpreter = fx.Interpreter(model, garbage_collect_values=False, graph=graph)
        self.guards: dict[tuple[fx.Node, bool], fx.Node] = {}

    def answer(self, node: fx.Node, question: Callable[[Any], Any]) -> Any:
        """What ``question`` says of the node's value; the graph from now on asserts that it says so.

        Raises:
            Undecided: the node's value is a tensor, or was computed from one's values.
        """
        value = self._value(node)
        if not self._tells_of_form(node):
            raise Undecided(f"{node.name} depends on the values of its input")
        truth = question is bool and isinstance(value, int)
        key = (node, truth)
        if key not in self.guards and not self._is_constant(node):
            self.guards[key] = self._guard(node, value, truth)
        return question(value)

    def length(self, node: fx.Node) -> int:
        """How many parts the node's value has: a tuple's, or a tensor's along its first axis; the graph from now on
        asserts it where it may differ for another input."""
        value = self._value(node)
        if isinstance(value, Tensor):
            asks = self.graph.call_method("size", (node, 0))
        elif isinstance(value, torch.Size) or node.target in _PARTS_BY_SIZE:
            asks = self.graph.call_function(length, (node,))
        else:
            return len(value)
        asks.meta["nn_module_stack"] = self.stack()
        return int(self.answer(asks, int))

    def _guard(self, node: fx.Node, value: Any, truth: bool) -> fx.Node:
        expected = 0 if truth else value
        test = operator.ne if truth and value else operator.eq
        same = self.graph.call_function(test, (node, expected))
        same.meta["nn_module_stack"] = self.stack()
        where = owner_of(same) or "the model"
        text = (
            f"{where} was traced with {node.name} = {value!r}; its code goes another way for this input: prepare the "
            "model with an example like it"
        )
        guard = self.graph.call_function(torch._assert, (same, text))
        guard.meta.update({_IS_GUARD: True, "nn_module_stack": self.stack()})
        return guard

    def _value(self, node: fx.Node) -> Any:
        interpreter = self.interpreter
        if node in interpreter.env:
            return interpreter.env[node]
        if not interpreter.env:
            placeholders = [self.arguments[str(n.target)] for n in self.graph.nodes if n.op == "placeholder"]
            interpreter.args_iter = iter(copies(placeholders))
        with torch.no_grad(), _calls_as_usual():
            for other in self.graph.nodes:
                if other not in interpreter.env:
                    interpreter.env[other] = interpreter.run_node(other)
                if other is node:
                    break
        return interpreter.env[node]

    def _tells_of_form(self, node: fx.Node) -> bool:
        value = self._value(node)
        if isinstance(value, Tensor):
            return False
        if node.op == "placeholder" or (node.op == "call_function" and node.target is length):
            return True
        operands = node.all_input_nodes
        if any(isinstance(self._value(operand), Tensor) for operand in operands):
            return _asks_for_form(node)
        return node.op != "call_module" and all(map(self._tells_of_form, operands))

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether no input of the model has a part in the node's value."""
        return node.op == "get_attr" or (node.op != "placeholder" and all(map(self._is_constant, node.all_input_nodes)))


def length(value: Any) -> Any:
    """How many parts a value has; of what is traced, recorded."""
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", length, (value,), {})
    return len(value)


class AnsweringProxy(fx.Proxy):
    """A proxy that lets code ask for what depends on shapes only."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _AnsweringAttribute(self, name)

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        tracer: Any = self.tracer
        try:
            return tracer.answers.answer(self.node, question)
        except Undecided as error:
            raise fx.proxy.TraceError(f"control flow on values: {error}") from None

    def __bool__(self) -> bool:
        return bool(self._ask(bool))

    def __int__(self) -> int:
        return int(self._ask(int))

    def __index__(self) -> int:
        return int(self._ask(int))

    def __float__(self) -> float:
        return float(self._ask(float))

    def __len__(self) -> int:
        tracer: Any = self.tracer
        return int(tracer.answers.length(self.node))

    def __hash__(self) -> int:
        return id(self)


class _AnsweringAttribute(AnsweringProxy, fx.proxy.Attribute):
    """An attribute of what is traced (``x.shape``), which may be a method."""


def drop_unread_answers(graph: fx.Graph) -> None:
    """Takes out what asked for shapes and types and is read by nothing since the answer is known: a weight's dtype
    must not keep the weight."""
    for node in reversed(list(graph.nodes)):
        asks = node.op == "get_attr" or _asks_for_form(node) or node.target in (operator.eq, operator.ne)
        if not node.users and asks:
            graph.erase_node(node)


def _asks_for_form(node: fx.Node) -> bool:
    """Whether the node asks a tensor for what tells of its form."""
    if node.op == "call_method":
        return node.target in _FORM_METHODS
    return node.op == "call_function" and (
        node.target in _FORM_FUNCTIONS or (node.target is getattr and node.args[1] in _FORM_ATTRIBUTES)
    )


def is_guard(node: fx.Node) -> bool:
    """Whether the node asserts what the code was told while it was traced."""
    return _IS_GUARD in node.meta


@contextmanager
def _calls_as_usual() -> Iterator[None]:
    """Modules compute although a trace is under way."""
    call, get = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__, nn.Module.__getattr__ = _MODULE_CALL, _MODULE_GETATTR  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = call, get  # type: ignore[method-assign]
