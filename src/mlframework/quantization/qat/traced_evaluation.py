"""What a layer computes on integers in evaluation, in operations that ``torch.compile`` can trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import arithmetic
from ..int8.folding import IntegerWeights
from .fake_quantize_layer import FakeQuantizeLayer
from .layer_types import Clip, layer_type_of


def traced_evaluation(
    layer: nn.Module,
    input: Tensor,
    weights: IntegerWeights,
    source: FakeQuantizeLayer,
    output: FakeQuantizeLayer | None,
    clip: Clip,
) -> Tensor:
    """The same integers as those of the integer layer, returned as float32: sums in float64 are exact.

    Args:
        layer: for its kind and its geometry.
        input: values that the source puts on its grid.
        weights: integer weights, batch normalization folded in.
        source, output: the nodes before and after; None leaves the output off any grid.
        clip: the range of the activation.
    """
    layer_type = layer_type_of(layer)
    assert layer_type is not None and layer_type.product is not None
    codes = source.to_codes(input)
    with torch.autocast(input.device.type, enabled=False):
        sums = layer_type.product(layer, codes.double() - source.code_of_zero, weights.codes.double())
    axis = sums.dim() - 1 - len(getattr(layer, "stride", ()))
    accumulator = sums.round().to(torch.int32) + arithmetic.along_axis(weights.bias, sums.dim(), axis)
    scale = source.scale * weights.scale
    if output is None:
        result = arithmetic.rescale_accumulator(accumulator, arithmetic.along_axis(scale, sums.dim(), axis))
        return result.clamp(*clip)
    zero_point = output.code_of_zero
    codes = arithmetic.requantize_accumulator(
        accumulator,
        arithmetic.along_axis(scale / output.scale, sums.dim(), axis),
        zero_point,
        *arithmetic.codes_of_clip(clip, output.scale, zero_point, output.scheme),
        output.scheme.dtype,
    )
    return output.to_values(codes)
