"""``convert``: a prepared model in, the model that computes on int8 out."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..graph.clone import copy_of
from ..graph.containers import graph_of, is_part
from ..graph.float_structure import move_float_structure
from ..graph.generated_forward import source_of
from ..graph.unflattening import set_forwards
from ..int8.integer_module import IntegerModule, PackedModule
from ..preparation.report import NEVER_REACHED, PreparationReport
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.given_weight import GivenWeightWrapper
from ..qat.observer_synchronizer import commit_statistics, discard_statistics
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.qat_operation import QATOperation
from ..qat.sharding import sharded_parameter
from ..state_check import check_state, has_check
from .between_floats import between_floats
from .lowering import lower
from .planning import plan
from .save_pretrained import replace_save_pretrained
from .unreached import restore_float, unreached_parts


def convert(model: nn.Module) -> nn.Module:
    """The model as true int8: int8 weights, int8 or uint8 activations, int32 sums.

    Linear layers and convolutions multiply integers; codes flow between them through whatever only moves or selects
    values, through sums, products, concatenations and averages, and through tables of element-wise functions. Batch
    normalization is folded in. What has no integer form computes on float32 between dequantize and quantize. The
    result gives, bit for bit, what the prepared model gives in evaluation mode without gradients, and holds no float
    copy of a quantized weight. It is for inference, and in evaluation mode.

    Args:
        model: from :func:`prepare`, calibrated or trained, or any module that holds such a model; it is not changed.
            Of what ``torch.compile`` or ``DistributedDataParallel`` made, the model inside is converted.

    Returns:
        A model of the same class; its state dict holds integer codes and scales.

    Raises:
        TypeError: the model is not prepared.
        ValueError: nothing in the model was quantized; a parameter of a quantized layer is not finite; or the model was
            cast to a dtype (bfloat16) with too few digits for its codes, so that it could not compute the same; or
            adapters of ``peft`` compute the weights of wrappers.
        RuntimeError: no data was seen, a node is switched off, or parameters are split over ranks.

    Warns:
        UserWarning: a layer that no data reached; it stays float.

    Example:
        >>> prepared = prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), QATConfig(),
        ...                    (torch.randn(1, 4),))
        >>> calibrate(prepared, [torch.randn(32, 4)])
        >>> int8_model = convert(prepared)
        >>> int8_model[0].weight.dtype
        torch.int8
        >>> x = torch.randn(5, 4)
        >>> with torch.no_grad():
        ...     torch.equal(int8_model(x), prepared.eval()(x))
        True
    """
    model = unwrapped(model)
    _check(model)
    _warn_of_unreached_layers(model)
    converted = _integer_form(copy_of(model))
    dtype = _float_dtype(model)
    for module in converted.modules():
        if isinstance(module, IntegerModule):
            module.float_dtype = dtype
        if isinstance(module, PackedModule):
            module.pack()
    if not (isinstance(converted, IntegerModule) or has_check(converted)):
        converted.register_load_state_dict_pre_hook(check_state)  # type: ignore[no-untyped-call]
    replace_save_pretrained(converted.modules())
    return converted.eval()


def _integer_form(converted: nn.Module) -> nn.Module:
    """Replaces what quantizes by what computes on integers, in place where the root itself stays."""
    _remove_hooks(converted)
    if isinstance(converted, (QATModuleWrapper, FakeQuantizeLayer)):
        root = between_floats(converted)
        move_float_structure(converted, root)
        return root
    for name, part in unreached_parts(converted):
        if is_part(part):  # it has not gone with another around it
            warnings.warn(f"no data reached {name}: it stays float", UserWarning, stacklevel=4)
            restore_float(part)
    for part in reversed(_prepared_parts(converted)):  # from the inside out
        graph = graph_of(part)
        _replace_nodes(part, {part.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"})
        edges = lower(part, graph)
        flat = plan(part, graph)
        set_forwards(part, graph, source_of(part).given[0], edges=edges, runs_own_code=False, flat=flat)
    _replace_nodes(converted, set())
    return converted


def _replace_nodes(model: nn.Module, connected: set[nn.Module]) -> None:
    """Puts integer modules in the place of the nodes that no graph connects; of one node under several names, one."""
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in _outermost_nodes(model):
        if module not in connected:
            if module not in replacements:
                replacements[module] = _alone(name, module)
            model.set_submodule(name, replacements[module])


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what ``torch.compile`` and data parallelism put around it."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _prepared_parts(model: nn.Module) -> list[nn.Module]:
    """The modules whose graph connects nodes, the outermost first: the model itself, or what it holds."""
    return [
        module
        for module in model.modules()
        if is_part(module) and any(isinstance(part, FakeQuantizeLayer) for part in module.modules())
    ]


def _float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the model computes in where it computes on floats."""
    for module in model.modules():
        if isinstance(module, QATModuleWrapper) and not isinstance(module, GivenWeightWrapper):
            return module.evaluated_weight().dtype
    own = [
        parameter
        for module in model.modules()
        if not isinstance(module, FakeQuantizeLayer)
        for parameter in module.parameters(recurse=False)
        if parameter.is_floating_point()
    ]
    return own[0].dtype if own else torch.float32


def _warn_of_unreached_layers(model: nn.Module) -> None:
    reports = [getattr(module, "preparation_report", None) for module in model.modules()]
    for report in reports:
        for entry in report.left_float if isinstance(report, PreparationReport) else ():
            if entry.detail == NEVER_REACHED:
                warnings.warn(f"no data reached {entry.name}: it stays float", UserWarning, stacklevel=3)


def _check(model: nn.Module) -> None:
    """Everything that can be refused is refused before anything is copied."""
    nodes = [module for module in model.modules() if isinstance(module, FakeQuantizeLayer)]
    if not nodes and isinstance(getattr(model, "preparation_report", None), PreparationReport):
        raise ValueError("model holds nothing to convert: prepare() found no layer to quantize in it")
    if not nodes:
        raise TypeError(f"model must be prepared, got {type(model).__name__} without any fake-quantize node")
    sharded = sharded_parameter(model)
    if sharded is not None:
        raise RuntimeError(
            f"model must hold whole parameters, got {sharded} split over ranks: gather its state on one rank (in "
            "torch.distributed.checkpoint.state_dict, get_model_state_dict with full_state_dict=True) and load it into "
            "a model that was prepared alike"
        )
    adapted = _adapted_layers(model)
    if adapted:
        raise ValueError(
            f"model must have its adapters merged, which peft computes the weights of {', '.join(adapted)} with: "
            "call merge_and_unload() before converting"
        )
    for node in nodes:
        if not node.fake_quantize_enabled:
            raise RuntimeError(f"{node.name or 'a node'} is switched off: set fake_quantize_enabled before converting")
    activations = [node for node in nodes if node.reduces_over_ranks]
    if activations and not any(node.is_initialized for node in activations):
        raise RuntimeError("model has seen no data, which its scales come from: train or calibrate before converting")
    dtype = _float_dtype(model)
    for node in activations:
        if node.is_initialized and _loses_codes(node, dtype):
            raise ValueError(
                f"model must compute in float32, got {dtype}, which cannot tell the codes of {node.name or 'a node'} "
                f"apart ({node.scheme}, scale {node.scale.tolist()}): keep the model in float32 and run it under "
                "torch.autocast"
            )
    unreached = [part for _, part in unreached_parts(model)]
    for part in _prepared_parts(model):
        if part in unreached:
            continue
        for name in {str(node.target) for node in graph_of(part).nodes if node.op == "call_module"}:
            module = part.get_submodule(name)
            for called in (module, getattr(module, "output_fake_quantize", None)):
                if isinstance(called, FakeQuantizeLayer):
                    called.require_initialized()


def _adapted_layers(model: nn.Module) -> list[str]:
    """The wrappers whose weight a module around them computes in every call, as that of ``target_parameters`` in
    ``peft`` does."""
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "parameter_name") and isinstance(module._modules.get("base_layer"), QATModuleWrapper)
    ]


def _loses_codes(node: FakeQuantizeLayer, dtype: torch.dtype) -> bool:
    """Whether values on the node's grid, in that dtype as a prepared model passes them on, no longer tell their codes,
    which are what a converted model passes on."""
    if dtype.itemsize >= torch.float32.itemsize or node.scheme.channel_axis is not None:
        return False
    codes = torch.arange(node.scheme.quant_min, node.scheme.quant_max + 1, device=node.scale.device)
    codes = codes.to(node.scheme.dtype)
    return not torch.equal(node.to_codes(node.to_values(codes).to(dtype)), codes)


def _remove_hooks(model: nn.Module) -> None:
    """Takes off what :func:`prepare` attached for training."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._load_state_dict_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "hook", hook) in (commit_statistics, discard_statistics):
                    del hooks[key]
        if "observer_synchronizer" in vars(module):
            del module.observer_synchronizer


def _outermost_nodes(model: nn.Module) -> list[tuple[str, QATModuleWrapper | FakeQuantizeLayer]]:
    """Wrappers and free-standing nodes by name, without the nodes inside wrappers and sums."""
    found: list[tuple[str, QATModuleWrapper | FakeQuantizeLayer]] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, (QATModuleWrapper, FakeQuantizeLayer)):
            found.append((name, module))
        if isinstance(module, (QATModuleWrapper, FakeQuantizeLayer, QATOperation)):
            inside += (f"{name}.",)
    return found


def _alone(name: str, module: QATModuleWrapper | FakeQuantizeLayer) -> nn.Module:
    """What stands in the place of a node that no graph connects."""
    nodes = [part for part in module.modules() if isinstance(part, FakeQuantizeLayer)]
    if all(node.is_initialized for node in nodes):
        return between_floats(module)
    warnings.warn(f"no data reached {name}: it stays float", UserWarning, stacklevel=5)
    return module.float_layer() if isinstance(module, QATModuleWrapper) else module.layer or nn.Identity()
