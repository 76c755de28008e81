"""``prepare``: a float model in, the same model with fake quantization out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.clone import clone_sharing_parameters
from ..graph.example_run import copies, random_state_kept
from ..graph.fixed_values import put_shapes_in
from ..graph.generated_forward import set_forward
from ..graph.tracing import trace
from ..int8.folding import BATCH_NORMS
from ..int8.integer_module import IntegerModule
from ..qat.batch_norms import evaluation_form
from ..qat.config import QATConfig
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.layer_types import layer_type_of
from ..qat.observer_synchronizer import ObserverSynchronizer, commit_statistics, discard_statistics
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.qat_operation import QATOperation
from ..scheme_state import check_schemes
from . import operations
from .batch_norm_parts import take_batch_norms_apart
from .function_layers import take_casts_out
from .graph_rewriter import GraphRewriter, layer_entry
from .placement import Placement, place, skip_reason
from .report import ALONE, NEVER_REACHED, UNCALLED, PreparationReport, ReportEntry
from .shares import Work, counted, shares, warning_of, with_work


def prepare(
    model: nn.Module,
    config: QATConfig | None = None,
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    recompute: bool = False,
) -> nn.Module:
    """A copy of the model with fake quantization in place, ready to calibrate and train.

    The model passed in is not changed. The prepared one has the same class, attributes, submodule names, hooks and
    state-dict keys (scales and statistics are added), and trains the same Parameters: an optimizer made before goes
    on working, and both models see every update. Buffers are its own.

    The model is traced with ``torch.fx``; a submodule whose code cannot be traced is kept whole, with its layers
    wrapped one by one. So is a model that cannot be traced at all. Nothing is refused for its control flow:
    :func:`preparation_report` tells what was done. Arguments that the example leaves out keep their defaults.

    Args:
        model: any module.
        config: what to quantize, and how.
        example_inputs: positional arguments of a typical call. They serve tracing and shapes, not statistics.
        example_kwargs: keyword arguments of that call.
        recompute: where a layer before a batch normalization trains on integers, do not keep its output for backward
            but compute it again from the codes. The values are the same; less memory for a little more time.

    Raises:
        TypeError: an argument is not of its type, or the examples do not fit the model's signature.
        ValueError: the model is prepared or converted already, does not run on the examples, or a selector of the
            configuration matches no layer.

    Warns:
        UserWarning: less than half of the weights or of the multiply-adds is quantized, of all that the configuration
            does not skip.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> prepared = prepare(model, QATConfig(), (torch.randn(1, 1, 4, 4),))
        >>> prepared(torch.randn(8, 1, 4, 4)).shape
        torch.Size([8, 2])
        >>> [entry.name for entry in preparation_report(prepared).quantized]
        ['input_1', '0', '4']
    """
    with random_state_kept():
        config = QATConfig() if config is None else config
        return _prepare(model, config, example_inputs, dict(example_kwargs or {}), recompute)


def _prepare(
    model: nn.Module, config: QATConfig, example_inputs: tuple[Any, ...], kwargs: dict[str, Any], recompute: bool
) -> nn.Module:
    work = _check(model, config, example_inputs, kwargs)
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute must be a bool, got {recompute!r}")
    prepared = clone_sharing_parameters(model)
    placement = Placement()
    if layer_type_of(prepared) is not None and skip_reason("", prepared, config) is None:
        prepared = QATModuleWrapper(prepared, config.for_layer("", prepared))
        entries = [layer_entry("", prepared)]
    else:
        leaves = {module for module in prepared.modules() if _is_leaf(module)}  # some tried, which a trace would record
        traced = trace(prepared, example_inputs, kwargs, leaves.__contains__)
        if traced.graph is None:
            reason = f"the model is not traced: {traced.kept_whole['']}"
            entries = [ReportEntry("", type(model).__name__, False, reason)]
            entries += _wrap_layers(prepared, "", config, reason)
        else:
            entries, placement = _rewrite(prepared, traced.graph, traced.kept_whole, config)
    entries = with_work(entries, work)
    report = PreparationReport(
        tuple(entries), config.target, *shares(model, entries, placement.read, placement.skipped, work)
    )
    prepared.preparation_report = report  # type: ignore[assignment]
    _connect(prepared)
    for module in prepared.modules():
        if isinstance(module, QATModuleWrapper):
            module.recompute = recompute
    warning = warning_of(report)
    if warning is not None:
        warnings.warn(warning, UserWarning, stacklevel=3)
    return prepared


def _check(model: nn.Module, config: QATConfig, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Work:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, QATConfig):
        raise TypeError(f"config must be a QATConfig, got {type(config).__name__}")
    if not isinstance(args, tuple):
        raise TypeError(f"example_inputs must be a tuple of arguments, got {type(args).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, (FakeQuantizeLayer, QATModuleWrapper)):
            raise ValueError(f"model is already prepared: {name or 'it'} is a {type(module).__name__}")
        if isinstance(module, IntegerModule):
            raise ValueError(f"model is already converted: {name or 'it'} is a {type(module).__name__}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"model must have all its parameters, got none yet for {name}: run it once first")
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"example_inputs and example_kwargs must fit the model's forward{inspect.signature(model.forward)}: {error}"
        ) from None
    unused = config.unused_selectors(dict(model.named_modules()))
    if unused:
        raise ValueError(f"overrides and skip must match layers of the model; these match none: {unused}")
    return _check_runs(model, args, kwargs)


@torch.no_grad()
def _check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Work:
    probe = clone_sharing_parameters(model).eval()
    try:
        return counted(probe, lambda: probe.forward(*copies(args), **copies(kwargs)))
    except Exception as error:
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in args]
        raise ValueError(f"example_inputs must run through the model, got {shapes}: {error}") from error


def _is_leaf(module: nn.Module) -> bool:
    return (
        layer_type_of(module) is not None
        or isinstance(module, (*BATCH_NORMS, *operations.OPAQUE_MODULES))
        or evaluation_form(module) is not None
        or operations.is_dropout(module)
    )


def _rewrite(
    root: nn.Module, graph: fx.Graph, kept_whole: dict[str, str], config: QATConfig
) -> tuple[list[ReportEntry], Placement]:
    """Puts the nodes where :func:`place` says and makes the graph the model's forward; returns the account, and
    where what went."""
    take_batch_norms_apart(root, graph)
    modules = dict(root.named_modules())
    put_shapes_in(graph, modules)
    take_casts_out(graph)
    placement = place(graph, modules, config)
    entries = GraphRewriter(root, graph, modules, config).rewrite(placement)
    for name in dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module"):
        if name in modules and layer_type_of(modules[name]) is None:
            reason = kept_whole.get(name, "its code is not traced")
            if name in kept_whole:
                entries = [
                    replace(e, detail=f"run by its own code: {reason}") if e.name == name else e for e in entries
                ]
            entries += _wrap_layers(modules[name], name, config, reason)
    set_forward(root, graph)
    reported = {entry.name for entry in entries}
    for name, module in modules.items():
        if layer_type_of(module) is not None and name not in reported:
            if any(parameter.startswith(f"{name}.") for parameter in placement.read):
                continue
            reason = placement.float_layers.get(name, NEVER_REACHED)
            entries.append(ReportEntry(name, type(module).__name__, False, reason))
    return entries, placement


def _wrap_layers(module: nn.Module, prefix: str, config: QATConfig, reason: str) -> list[ReportEntry]:
    """Wraps the layers inside a module that is called as a whole, each with nodes of its own around it."""
    entries = []
    opaque: list[str] = []
    found: dict[int, QATModuleWrapper] = {}
    layers = [(name, layer) for name, layer in module.named_modules(remove_duplicate=False)]
    for name, layer in layers:
        qualified = ".".join(filter(None, (prefix, name)))
        if isinstance(layer, operations.OPAQUE_MODULES):
            opaque.append(f"{qualified}.")
        if layer_type_of(layer) is None or not name:
            continue
        if any(qualified.startswith(outer) for outer in opaque):
            entries.append(ReportEntry(qualified, type(layer).__name__, False, UNCALLED))
            continue
        layer_config = config.for_layer(qualified, layer)
        obstacle = skip_reason(qualified, layer, config)
        if obstacle is not None or layer_config is None:
            entries.append(ReportEntry(qualified, type(layer).__name__, False, str(obstacle)))
            continue
        if id(layer) not in found:
            found[id(layer)] = QATModuleWrapper(layer, layer_config)
            entries.append(layer_entry(qualified, found[id(layer)], f"{ALONE}: {reason}"))
        module.set_submodule(name, found[id(layer)])
    wrappers = list(found.values())
    if prefix == "" and wrappers and isinstance(wrappers[-1].layer, nn.Linear) and not config.quantize_last_linear:
        wrappers[-1].output_fake_quantize = None  # the model's result, as far as one can tell
    return entries


def _connect(prepared: nn.Module) -> None:
    """Names the nodes, puts them in the model's mode, lets their observers update together, and guards against
    states of other schemes."""
    shared = []
    for name, module in prepared.named_modules():
        if isinstance(module, (FakeQuantizeLayer, QATOperation)):
            module.train(prepared.training)
        if isinstance(module, FakeQuantizeLayer):
            module.name = name
            if module.reduces_over_ranks:
                shared.append(module)
    prepared.observer_synchronizer = ObserverSynchronizer(shared)  # type: ignore[assignment]
    prepared.register_forward_pre_hook(discard_statistics)
    prepared.register_forward_hook(commit_statistics)
    prepared.register_load_state_dict_pre_hook(check_schemes)  # type: ignore[no-untyped-call]
