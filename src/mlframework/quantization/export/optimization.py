"""What torch.onnx and torch.export do for longer than they need."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_registries: dict[Any, Any] = {}
_decompositions: dict[Any, dict[Any, Any]] = {}
_patching = threading.RLock()


@contextmanager
def without_slow_rules() -> Iterator[None]:
    """Leaves out a rule that makes one split of two slices: for every node it goes through the whole graph, which takes
    as long as all other rules together, and longer in larger graphs. Engines run slices as well as splits."""
    from onnxscript import rewriter
    from onnxscript.rewriter.rules.common import slice_split_rule

    rules = rewriter._DEFAULT_REWRITE_RULES  # there is no other way to choose what torch.onnx applies
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule is not slice_split_rule)
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules


@contextmanager
def with_kept_translations() -> Iterator[None]:
    """Keeps the table of how operators are written in ONNX, which torch.onnx builds anew for every export: it parses
    the source of 500 functions, which takes nearly as long as all the rest for a small model."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    def kept(cls: Any, /, **options: Any) -> Any:
        # It has only operators that are declared by then: what is imported later may declare more.
        key = len(torch._C._dispatch_get_all_op_names()), *options.items()
        if key not in _registries:
            _registries[key] = build.__get__(None, cls)(**options)
        registry = copy.copy(_registries[key])
        registry.functions = {name: list(functions) for name, functions in registry.functions.items()}
        return registry

    with _patching:
        build = ONNXRegistry.__dict__["from_torchlib"]
        ONNXRegistry.from_torchlib = classmethod(kept)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            ONNXRegistry.from_torchlib = build  # type: ignore[method-assign]


@contextmanager
def with_kept_decompositions() -> Iterator[None]:
    """Keeps the table of what operators without a form in ONNX are made up of, which torch.onnx builds anew for every
    export: a tenth of its time for a small model."""
    from torch.onnx._internal.exporter import _decomp

    def kept(written: set[Any]) -> dict[Any, Any]:
        declared = len(torch._C._dispatch_get_all_op_names()), len(torch._decomp.decomposition_table)
        key = *declared, frozenset(written)
        if key not in _decompositions:
            _decompositions[key] = build(written)
        return dict(_decompositions[key])

    with _patching:
        build = _decomp.create_onnx_friendly_decomposition_table
        _decomp.create_onnx_friendly_decomposition_table = kept  # type: ignore[assignment]
        try:
            yield
        finally:
            _decomp.create_onnx_friendly_decomposition_table = build


@contextmanager
def with_operators_found_once() -> Iterator[None]:
    """PyTorch asks its dispatcher for the operators that are made up of others once for every namespace of operators,
    each time that it decomposes a program: for all of them at once is enough. Takes a fifth off an export."""
    from torch._export import utils

    found: set[str] = set()

    def find() -> None:
        names = set(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
        if not names <= found:  # or there are new ones
            find_all()
            found.update(names)

    with _patching:
        find_all = utils._materialize_cpp_cia_ops
        utils._materialize_cpp_cia_ops = find
        try:
            yield
        finally:
            utils._materialize_cpp_cia_ops = find_all
