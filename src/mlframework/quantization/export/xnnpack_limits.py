"""Which grids XNNPACK has no kernel for: it would refuse the program on the day that it is loaded."""

from __future__ import annotations

from torch import nn

from .. import arithmetic
from ..int8.integer_operation import Addition, Multiplication
from ..int8.operations import Int8Operation
from ..xnnpack_arithmetic import PRODUCT_RATIOS, SUM_RATIOS
from .program import NotExportableError


def check_ratios(converted: nn.Module) -> None:
    """Refuses sums and products whose grids are too far apart.

    Raises:
        NotExportableError: there is one; the message names it.
    """
    for name, module in converted.named_modules():
        if not isinstance(module, Int8Operation):
            continue
        scales = [grid.scale for grid in module.input_parameters]
        if isinstance(module.operation, Addition):
            ratios, (lowest, highest) = [scale / module.output_scale for scale in scales], SUM_RATIOS
        elif isinstance(module.operation, Multiplication):
            ratios = [arithmetic.multiply_ratio(scales[0], scales[1], module.output_scale)]
            lowest, highest = PRODUCT_RATIOS
        else:
            continue
        for ratio in map(float, ratios):
            if not lowest <= ratio < highest:
                raise NotExportableError(
                    f"{name} is a {module.operation} whose operands' scales are {ratio:g} of its output's, and XNNPACK "
                    f"takes {lowest:g} to {highest:g}: calibrate it on data on which its operands are not next to "
                    "nothing beside one another, or skip the layers that make them"
                )
