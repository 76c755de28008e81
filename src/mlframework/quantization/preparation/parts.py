"""A model as parts: what a graph connects, and what runs its own code with the layers that it calls wrapped alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..graph.decisions import drop_unread_answers
from ..graph.fixed_values import put_shapes_in
from ..graph.nodes import replace_module
from ..graph.tracing import HAS_HOOKS, Trace, leaf_names, trace
from ..graph.unflattening import set_forwards
from ..graph.watching import PATCHED, Observation, is_inside
from ..int8.folding import BATCH_NORMS
from ..qat.batch_norms import evaluation_form
from ..qat.config import QATConfig
from ..qat.layer_types import layer_type_of
from ..qat.qat_module_wrapper import QATModuleWrapper
from . import operations
from .batch_norm_parts import take_batch_norms_apart
from .function_layers import take_casts_out
from .graph_rewriter import GraphRewriter, layer_entry
from .placement import place, skip_reason, takes_output_grid
from .report import ALONE, NEVER_REACHED, UNCALLED, ReportEntry


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is called as it is, whatever its code does. Some are tried for it."""
    return (
        layer_type_of(module) is not None
        or isinstance(module, (*BATCH_NORMS, *operations.OPAQUE_MODULES))
        or evaluation_form(module) is not None
        or operations.is_dropout(module)
    )


class PartPreparation:
    """Prepares a model part by part, in place.

    Args:
        root: the model.
        config: what to quantize, and how.
        observations: see :func:`.tracing.observed`.
    """

    def __init__(self, root: nn.Module, config: QATConfig, observations: Mapping[bool, Observation]) -> None:
        self.root = root
        self.config = config
        self.observations = observations
        self.modules = dict(root.named_modules())
        self.read: set[str] = set()  # the names of parameters that functions take as weights
        self.skipped: set[str] = set()  # and of those that stay float by the configuration
        self.leaves = leaf_names(root, is_leaf)
        self.done: set[nn.Module] = set()

    def prepare_model(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[ReportEntry]:
        """Prepares the whole model; returns an account of every layer and operation."""
        entries = self._prepare("", args, kwargs, {})
        reported = {entry.name for entry in entries}
        for name, module in self.modules.items():
            if name not in reported and name and operations.is_patched(module):
                entries.append(ReportEntry(name, type(module).__name__, False, PATCHED))
            elif layer_type_of(module) is not None and name not in reported:
                if any(parameter.startswith(f"{name}.") for parameter in self.read):
                    continue
                entries.append(ReportEntry(name, type(module).__name__, False, self._why_unreached(name)))
        return entries

    def _why_unreached(self, name: str) -> str:
        outer = name
        while outer:
            outer = outer.rpartition(".")[0]
            if isinstance(self.modules.get(outer), operations.OPAQUE_MODULES):
                return UNCALLED
        return NEVER_REACHED

    def _prepare(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], own_code: Mapping[str, str]
    ) -> list[ReportEntry]:
        part = self.modules[name]
        self.done.add(part)
        seen = {mode: observation.of(name) for mode, observation in self.observations.items()}
        traced = trace(part, args, kwargs, is_leaf, seen, own_code)
        if traced.graph is None:
            reason = traced.own_code[""]
            own_entry = ReportEntry(name, type(part).__name__, False, f"run by its own code: {reason}")
            called = dict.fromkeys(callee for each in seen.values() for callee in each.callees.get("", ()))
            entries = [own_entry, *self._wrap_layers(name, list(called), reason)]
            reasons: Mapping[str, str] = own_code
        else:
            called = dict.fromkeys(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
            entries = self._rewrite(name, part, traced)
            reasons = traced.own_code
        for callee in called:
            path = _joined(name, callee)
            module = self.modules.get(path)
            if module is None or module in self.done or path in self.leaves:
                continue
            calls = next((each.calls[callee] for each in (seen[False], seen[True]) if callee in each.calls), None)
            if calls is None:
                continue
            known = {
                key[len(callee) :].removeprefix("."): why
                for key, why in reasons.items()
                if (key == callee and why != HAS_HOOKS) or key.startswith(f"{callee}.")
            }
            entries = [entry for entry in entries if entry.name != path]
            entries += self._prepare(path, calls[0].args, calls[0].kwargs, known)
        return entries

    def _rewrite(self, prefix: str, part: nn.Module, traced: Trace) -> list[ReportEntry]:
        """Puts the nodes where :func:`place` says and makes the graph the part's forward."""
        graph = traced.graph
        assert graph is not None
        take_batch_norms_apart(part, graph)
        modules = operations.recognizable(part)
        put_shapes_in(graph, modules)
        take_casts_out(graph)
        drop_unread_answers(graph)
        placement = place(graph, modules, self.config, prefix)
        entries = GraphRewriter(part, graph, modules, self.config).rewrite(placement)
        set_forwards(part, graph, traced.given, reads=traced.reads)
        self.read |= {_joined(prefix, name) for name in placement.read}
        self.skipped |= {_joined(prefix, name) for name in placement.skipped}
        reported = {entry.name for entry in entries}
        entries += [
            ReportEntry(name, type(modules[name]).__name__, False, reason)
            for name, reason in placement.float_layers.items()
            if name not in reported
        ]
        return [replace(entry, name=_joined(prefix, entry.name)) for entry in entries]

    def _wrap_layers(self, prefix: str, called: list[str], reason: str) -> list[ReportEntry]:
        """Wraps the layers that a module's own code calls, or may call with other data, each with nodes of its own
        around it."""
        part = self.modules[prefix]
        apart = [name for name, module in part.named_modules() if name in called and not _is_layer(module)]
        apart += [
            name for name, module in part.named_modules() if name and isinstance(module, operations.OPAQUE_MODULES)
        ]
        entries = []
        for name, layer in part.named_modules():
            qualified = _joined(prefix, name)
            if not _is_layer(layer) or any(is_inside(name, outer) for outer in apart):
                continue
            if operations.is_patched(layer):
                entries.append(ReportEntry(qualified, type(layer).__name__, False, PATCHED))
                continue
            config = self.config.for_layer(qualified, layer)
            obstacle = skip_reason(qualified, layer, self.config)
            if obstacle is not None or config is None:
                entries.append(ReportEntry(qualified, type(layer).__name__, False, str(obstacle)))
                continue
            wrapper = QATModuleWrapper(layer, config)
            is_result = prefix == "" and called[-1:] == [name]  # of the model, as far as one can tell
            if not takes_output_grid(layer, config) and not (config.quantize_last_linear and is_result):
                wrapper.output_fake_quantize = None  # its own code reads floats
            entries.append(layer_entry(qualified, wrapper, f"{ALONE}: {reason}"))
            replace_module(self.root, layer, wrapper)
        return entries


def _is_layer(module: nn.Module) -> bool:
    return layer_type_of(module) is not None


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
