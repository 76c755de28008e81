"""From a program of this library's operators to one of PyTorch's own for quantization: the engine-neutral form.

``torch.ops.quantized_decomposed`` is what PyTorch's exporters (PT2E) agree on, and what ExecuTorch's delegates read.
"""

from __future__ import annotations

from typing import Any

import torch

# Declares the operators.
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from .qdq_operators import PER_TENSOR

_own: Any = torch.ops.mlframework_quantization
_decomposed: Any = torch.ops.quantized_decomposed


def lower_to_decomposed(program: torch.export.ExportedProgram) -> None:
    """Writes quantize and dequantize nodes as those of ``quantized_decomposed``, and ``Gemm`` as a linear layer.

    Scales and zero points of a tensor become numbers, those of channels stay tensors; weights are int8 and biases int32
    tensors before dequantize nodes. The program changes in place.
    """
    graph = program.graph
    # The signature names the nodes of the results, too.
    with program.graph_module._set_replace_hook(program.graph_signature.get_replace_hook()):
        for node in list(graph.nodes):
            if node.op == "call_function":
                _lower(program, node)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()


def _lower(program: torch.export.ExportedProgram, node: fx.Node) -> None:
    graph = program.graph
    if node.target is _own.gemm.default:
        node.target = torch.ops.aten.linear.default
    elif _is_idle(node):
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    else:
        with graph.inserting_before(node):
            lowered = _lowered(program, node)
        if lowered is not None:
            lowered.meta = dict(node.meta)
            node.replace_all_uses_with(lowered)
            graph.erase_node(node)


def _is_idle(node: fx.Node) -> bool:
    """Whether a node takes a whole tensor as a part of it, as ``x[:, 1:]`` does along the first axis."""
    if node.target is torch.ops.aten.alias.default:
        return True
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    return node.meta["val"].shape == node.all_input_nodes[0].meta["val"].shape and 1 in (node.args[4:] or (1,))


def constant_of(program: torch.export.ExportedProgram, node: Any) -> Tensor | None:
    """The tensor that an input of the program's graph stands for; None for what a caller gives."""
    for spec in program.graph_signature.input_specs:
        if spec.target is not None and isinstance(node, fx.Node) and getattr(spec.arg, "name", None) == node.name:
            value = program.state_dict.get(spec.target, program.constants.get(spec.target))
            return value if isinstance(value, Tensor) else None
    return None


def _lowered(program: torch.export.ExportedProgram, node: fx.Node) -> fx.Node | None:
    args: tuple[Any, ...]
    if node.target is _own.dequantize_bias.default:
        codes, scale = node.args
        operator, args = _decomposed.dequantize_per_channel, (codes, scale, None, 0, *_range_of(torch.int32))
    elif node.target in (_own.quantize.default, _own.dequantize.default):
        input, scale, zero_point, axis = node.args
        scales, zero_points = constant_of(program, scale), constant_of(program, zero_point)
        assert scales is not None
        assert zero_points is not None
        kind = "quantize" if node.target is _own.quantize.default else "dequantize"
        ends = _range_of(zero_points.dtype)
        if axis == PER_TENSOR:
            operator = getattr(_decomposed, f"{kind}_per_tensor")
            args = (input, float(scales), int(zero_points), *ends)
        else:
            operator, args = getattr(_decomposed, f"{kind}_per_channel"), (input, scale, zero_point, axis, *ends)
    else:
        return None
    lowered: fx.Node = program.graph.call_function(operator.default, args)
    return lowered


def _range_of(dtype: torch.dtype) -> tuple[int, int, torch.dtype]:
    ends = torch.iinfo(dtype)
    return ends.min, ends.max, dtype
