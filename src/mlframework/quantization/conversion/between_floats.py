"""The integer form of one wrapper or node that stands between floats."""

from __future__ import annotations

from torch import nn

from ..int8.layers import Int8Embedding
from ..int8.operations import Dequantize, Int8WithFloatEdges, OnGrid, Quantize
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.layer_types import layer_type_of
from ..qat.qat_module_wrapper import QATModuleWrapper


def between_floats(module: QATModuleWrapper | FakeQuantizeLayer) -> nn.Module:
    """A module from floats to floats that computes what ``module`` computes in evaluation, on integers inside."""
    if isinstance(module, FakeQuantizeLayer):
        grid = OnGrid(module.parameters_on_grid)
        return grid if module.layer is None else nn.Sequential(module.layer, grid)
    layer = module.to_integer()
    output = module.output_fake_quantize
    if isinstance(layer, Int8Embedding):
        return layer if output is None else nn.Sequential(layer, OnGrid(output.parameters_on_grid))
    source = module.input_source
    layer_type = layer_type_of(module.layer)
    assert source is not None and layer_type is not None
    return Int8WithFloatEdges(
        Quantize(source.parameters_on_grid),
        layer,
        None if output is None else Dequantize(output.parameters_on_grid),
        layer_type.output_axis,
        {name: value for name, value in vars(module.layer).items() if not name.startswith("_") and name != "training"},
    )
