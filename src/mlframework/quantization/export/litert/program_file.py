"""A program node by node into a ``.tflite`` file."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import OutputKind
from torch.utils._pytree import tree_leaves

from ..program import quiet
from ..qdq_program import constant_of
from . import layers, moves, operations
from .flat_model import FlatModel
from .fused_output import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE, channel_grid_of, grid_of
from .values import Value, Values, constant, in_order, sizes_of

_aten: Any = torch.ops.aten
_Emitter = Callable[[Values, fx.Node], Value | list[Value]]

_EMITTERS: dict[Any, _Emitter] = {
    _aten.convolution.default: layers.convolution,
    _aten.linear.default: layers.linear,
    _aten.add.Tensor: operations.binary("ADD", "AddOptions", on_codes=True),
    _aten.add.Scalar: operations.binary("ADD", "AddOptions"),
    _aten.mul.Tensor: operations.binary("MUL", "MulOptions", on_codes=True),
    _aten.mul.Scalar: operations.binary("MUL", "MulOptions"),
    _aten.sub.Tensor: operations.binary("SUB", "SubOptions"),
    _aten.div.Tensor: operations.binary("DIV", "DivOptions"),
    _aten.div.Scalar: operations.binary("DIV", "DivOptions"),
    _aten.maximum.default: operations.binary("MAXIMUM", "MaximumMinimumOptions"),
    _aten.minimum.default: operations.binary("MINIMUM", "MaximumMinimumOptions"),
    _aten.pow.Tensor_Scalar: operations.binary("POW", "PowOptions"),
    _aten.relu.default: operations.relu,
    _aten.hardtanh.default: operations.clamp,
    _aten.clamp.default: operations.clamp,
    _aten.leaky_relu.default: operations.leaky_relu,
    _aten.gelu.default: operations.gelu,
    _aten.sigmoid.default: operations.unary("LOGISTIC"),
    _aten.tanh.default: operations.unary("TANH"),
    _aten.hardswish.default: operations.unary("HARD_SWISH", "HardSwishOptions"),
    _aten.elu.default: operations.elu,
    _aten.exp.default: operations.unary("EXP", "ExpOptions"),
    _aten.log.default: operations.unary("LOG"),
    _aten.sqrt.default: operations.unary("SQRT"),
    _aten.rsqrt.default: operations.unary("RSQRT"),
    _aten.abs.default: operations.unary("ABS", "AbsOptions"),
    _aten.neg.default: operations.unary("NEG", "NegOptions"),
    _aten.cos.default: operations.unary("COS", "CosOptions"),
    _aten.sin.default: operations.unary("SIN"),
    _aten._prelu_kernel.default: operations.prelu,
    _aten._softmax.default: operations.softmax,
    _aten._safe_softmax.default: operations.safe_softmax,
    _aten.where.self: operations.where,
    _aten.mean.dim: operations.reduction("MEAN"),
    _aten.sum.dim_IntList: operations.reduction("SUM"),
    _aten.amax.default: operations.reduction("REDUCE_MAX"),
    _aten.amin.default: operations.reduction("REDUCE_MIN"),
    _aten.avg_pool2d.default: operations.average_pool,
    _aten.upsample_bilinear2d.vec: operations.bilinear,
    _aten._native_batch_norm_legit_no_training.default: operations.batch_norm,
    _aten.native_layer_norm.default: operations.layer_norm,
    _aten.mm.default: operations.product,
    _aten.bmm.default: operations.product,
    _aten.view.default: moves.reshape,
    _aten._unsafe_view.default: moves.reshape,
    _aten.reshape.default: moves.reshape,
    _aten.squeeze.dims: moves.reshape,
    _aten.unsqueeze.default: moves.reshape,
    _aten.permute.default: moves.permute,
    _aten.cat.default: moves.cat,
    _aten.slice.Tensor: moves.narrow,
    _aten.select.int: moves.select,
    _aten.split_with_sizes.default: moves.split,
    _aten.constant_pad_nd.default: moves.pad,
    _aten.reflection_pad1d.default: moves.mirror,
    _aten.reflection_pad2d.default: moves.mirror,
    _aten.expand.default: moves.expand,
    _aten.max_pool2d.default: moves.max_pool,
    _aten.max_pool2d_with_indices.default: moves.max_pool_alone,
    _aten.upsample_nearest2d.vec: moves.nearest,
    _aten.embedding.default: moves.rows,
    _aten._to_copy.default: operations.cast,
    _aten.clone.default: moves.same,
    _aten.alias.default: moves.same,
    _aten.detach.default: moves.same,
}
# Kept by PyTorch's decompositions, which would make operators of them that LiteRT has not.
_KEPT = (
    _aten.linear.default,
    _aten.max_pool2d.default,
    _aten.upsample_nearest2d.vec,
    _aten.upsample_bilinear2d.vec,
    _aten.hardswish.default,
    _aten._prelu_kernel.default,
    _aten.reflection_pad1d.default,
    _aten.reflection_pad2d.default,
    _aten._safe_softmax.default,
)


def file_of(program: torch.export.ExportedProgram) -> tuple[bytes, list[str]]:
    """The bytes of a file that computes a program of ``quantized_decomposed`` operators, and what each of its operators
    is made from.

    Raises:
        ImportError: ai-edge-litert is not installed.
        NotExportableError: an operator has no form in LiteRT; the message names it.
    """
    program = _decomposed(program)
    values = Values(FlatModel())
    inputs: dict[str, int] = {}
    arguments = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        values.node = node
        if node.op == "placeholder":
            if node.name in arguments:
                _add_input(values, node, inputs)
            elif (data := constant_of(program, node)) is not None:
                values[node] = constant(data.detach())
        elif node.op == "call_function" and node not in values:
            _add(program, values, node)
    buffer = values.model.to_bytes(inputs, _outputs(program, values))
    return buffer, values.model.origins


def _decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    table: Any = torch.export.default_decompositions()
    for kept in _KEPT:
        table.pop(kept, None)
    with quiet():
        decomposed: torch.export.ExportedProgram = program.run_decompositions(table)
    return decomposed


def _add_input(values: Values, node: fx.Node, inputs: dict[str, int]) -> None:
    if not isinstance(node.meta["val"], Tensor):
        return  # a number or None, which the program has as a constant
    value = values.new(sizes_of(node), dtype=node.meta["val"].dtype)
    assert value.tensor is not None
    inputs[node.name] = value.tensor
    values[node] = value


def _add(program: torch.export.ExportedProgram, values: Values, node: fx.Node) -> None:
    if node.target is QUANTIZE:
        values[node] = _quantized(values, node)
    elif node.target is DEQUANTIZE:
        values[node] = _on_grid(values, node)
    elif node.target is DEQUANTIZE_CHANNELS:
        codes = values[node.args[0]]
        assert codes.data is not None
        values[node] = constant(codes.data, channel_grid_of(program, node))
    elif node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        if index >= len(values.parts[source]):
            raise values.refusal("of its results LiteRT has the first alone")
        values[node] = values.parts[source][index]
    elif node.meta.get("val") is None:
        pass  # a check of the program's own
    elif (known := _known(values, node)) is not None:
        values[node] = constant(known)
    else:
        emitter = _EMITTERS.get(node.target)
        if emitter is None:
            raise values.refusal("there is no operator for it")
        made = emitter(values, node)
        if isinstance(made, list):
            values.parts[node] = made
        else:
            values[node] = made
            made = [made]
        for value, result in zip(made, tree_leaves(node.meta["val"]), strict=False):  # of some, the first alone
            _check(values, value, result)


def _check(values: Values, value: Value, result: Tensor) -> None:
    """Refuses what would be computed in another shape or dtype than the program's, and what has no elements."""
    if result.numel() == 0:
        raise values.refusal("its tensors have elements")  # a slice of none takes all
    dtype = value.dtype if value.grid is None else torch.float32
    if (value.shape, dtype) != (tuple(result.shape), result.dtype):
        raise values.refusal(
            f"it gives {dtype} of shape {list(value.shape)} where PyTorch gives {result.dtype} of {list(result.shape)}"
        )


def _known(values: Values, node: fx.Node) -> Tensor | None:
    """What a node computes of constants alone: masks, positions and the like."""
    found: dict[fx.Node, Tensor] = {}
    for source in node.all_input_nodes:
        data = values.known(source)
        if data is None:
            return None
        found[source] = data
    if not isinstance(node.meta.get("val"), Tensor) or torch.Tag.nondeterministic_seeded in _tags_of(node):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
    computed = node.target(*args, **kwargs)  # type: ignore[operator]
    assert isinstance(computed, Tensor)
    return computed.contiguous()


def _tags_of(node: fx.Node) -> Collection[torch.Tag]:
    return node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()


def _quantized(values: Values, node: fx.Node) -> Value:
    """Floats, or codes of another grid, on a grid; codes that lie on it are there."""
    grid, value = grid_of(node), values[node.args[0]]
    if value.grid == grid:
        return value
    floats = values.floats(node.args[0])
    return values.operator("QUANTIZE", [floats], values.new(floats.shape, floats.axes, grid=grid))


def _on_grid(values: Values, node: fx.Node) -> Value:
    """Codes as the floats that they stand for."""
    codes, grid = values[node.args[0]], grid_of(node)
    if codes.data is not None:
        return constant(codes.data, grid)
    if codes.grid != grid:
        raise values.refusal("its codes are read on another grid than they were made on")
    return codes


def _outputs(program: torch.export.ExportedProgram, values: Values) -> dict[str, int]:
    outputs: dict[str, int] = {}
    signature = program.graph_signature
    for buffer in signature.buffers_to_mutate.values():
        raise values.refusal(f"its forward changes {buffer}, and its files keep nothing between calls")
    results: Any = program.graph.output_node().args[0]
    specs = zip(results, signature.output_specs, strict=True)
    own = [result for result, spec in specs if spec.kind is OutputKind.USER_OUTPUT]
    for index, result in enumerate(own):
        if not isinstance(result, fx.Node):
            continue
        value = values.floats(result)
        value = values.written(values.arranged(value, in_order(len(value.shape))))
        assert value.tensor is not None
        outputs[f"output_{index}"] = value.tensor
    return outputs
