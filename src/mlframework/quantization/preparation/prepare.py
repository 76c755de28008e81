"""``prepare``: a float model in, the same model with fake quantization out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.clone import clone_sharing_parameters, scratch_of
from ..graph.example_run import copies, random_state_kept
from ..graph.float_structure import move_float_structure, note_float_structure
from ..graph.padded_positions import compute_padded_positions
from ..graph.tracing import observed
from ..int8.integer_module import IntegerModule
from ..qat.config import QATConfig
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.layer_types import layer_type_of
from ..qat.observer_synchronizer import ObserverSynchronizer, commit_statistics, discard_statistics
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.qat_operation import QATOperation
from ..qat.sharding import sharded_parameter
from ..qat.weight_range import require_finite_parameters
from ..state_check import check_state
from .graph_rewriter import layer_entry
from .parts import PartPreparation, is_leaf
from .placement import skip_reason
from .report import PreparationReport
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

    The model is traced with ``torch.fx``, and each trace is proved: values, gradients and buffers are those of the
    model's own code, in training and in evaluation. A module of which that does not hold (control flow on values,
    another gradient mode, custom backward functions, checkpointing, ...) runs its own code; the layers that it calls
    itself are wrapped one by one, the containers that it calls are traced again. Nothing is refused for its control
    flow: :func:`preparation_report` tells what was done. In a call with other arguments than the example's (one that
    the example leaves out), a module runs its own code, too, with quantized weights.

    Args:
        model: any module.
        config: what to quantize, and how.
        example_inputs: positional arguments of a typical call. They serve tracing and shapes, not statistics.
        example_kwargs: keyword arguments of that call.
        recompute: where a layer before a batch normalization trains on integers, do not keep its output for backward
            but compute it again from the codes. The values are the same; less memory for a little more time.

    Raises:
        TypeError: an argument is not of its type, or the examples do not fit the model's signature.
        ValueError: the model is prepared or converted already, does not run on the examples, a parameter to be
            quantized is not finite or split over ranks, or a selector of the configuration matches no layer.

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
    observations = observed(model, example_inputs, kwargs, is_leaf)
    prepared = clone_sharing_parameters(model)
    note_float_structure(prepared)
    compute_padded_positions(prepared)
    read: set[str] = set()
    skipped: set[str] = set()
    if layer_type_of(prepared) is not None and skip_reason("", prepared, config) is None:
        layer, prepared = prepared, QATModuleWrapper(prepared, config.for_layer("", prepared))
        move_float_structure(layer, prepared)
        entries = [layer_entry("", prepared)]
    else:
        preparation = PartPreparation(prepared, config, observations)
        entries = preparation.prepare_model(example_inputs, kwargs)
        read, skipped = preparation.read, preparation.skipped
    entries = with_work(entries, work)
    report = PreparationReport(tuple(entries), config.target, *shares(model, entries, read, skipped, work))
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
    sharded = sharded_parameter(model)
    if sharded is not None:
        raise ValueError(
            f"model must be prepared before its parameters are split over ranks, which {sharded} is already"
        )
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
    for name, module in model.named_modules():
        if layer_type_of(module) is not None and skip_reason(name, module, config) is None:
            require_finite_parameters(module, name)
    return _check_runs(model, args, kwargs)


@torch.no_grad()
def _check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Work:
    probe = scratch_of(model).eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the model has to say, it says when it is called in earnest
            return counted(probe, lambda: probe.forward(*copies(args), **copies(kwargs)))
    except Exception as error:
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in args]
        raise ValueError(f"example_inputs must run through the model, got {shapes}: {error}") from error


def _connect(prepared: nn.Module) -> None:
    """Names the nodes, puts them in the model's mode, lets their observers update together, and has states
    checked before they are loaded."""
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
    if not isinstance(prepared, QATModuleWrapper):  # which does it itself
        prepared.register_load_state_dict_pre_hook(check_state)  # type: ignore[no-untyped-call]
