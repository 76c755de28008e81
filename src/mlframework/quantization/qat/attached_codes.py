"""The codes of a fake-quantized tensor, kept beside it: what a layer that computes on integers reads.

A tensor of values on a grid and its codes say the same. Whatever only sees the values works as ever; a quantized layer
finds the codes and need not quantize again.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .. import kernels
from ..graph.hooks import is_watched
from ..kernels.differentiable.layer import Codes
from ..scheme import QuantizationScheme

_ATTRIBUTE = "_quantized_codes"


def attach_codes(values: Tensor, codes: Tensor, grid: Tensor) -> Tensor:
    """The values, with codes and the grid that they were made with beside them, for as long as nothing changes the
    values in place."""
    if kernels.is_traced():
        values = values.view_as(values)  # Dynamo sets no attribute of what came out of a tuple
        setattr(values, _ATTRIBUTE, (Codes(codes, grid), None))
    elif not values.is_inference():  # which nobody would notice being changed
        setattr(values, _ATTRIBUTE, (Codes(codes, grid), values._version))
    return values


class Way(NamedTuple):
    """How values come to the module that reads their codes.

    Attributes:
        reader: that module.
        passes: where the model's graph hands it what a node returned as it is, the modules that the values come from
            and by; None where something is done to them on the way.
    """

    reader: nn.Module
    passes: tuple[nn.Module, ...] | None


def attached_codes(values: Tensor, way: Way | None) -> Codes | None:
    """The codes kept beside values; None where there are none, as of a view, or where they may be of other values.

    A compiler that traces counts no changes in place. There the graph has to say that there are none, and no module on
    the way may have a hook.
    """
    attached: tuple[Codes, int | None] | None = getattr(values, _ATTRIBUTE, None)
    if attached is None:
        return None
    if kernels.is_traced():
        is_same = way is not None and way.passes is not None and not is_watched(way.reader, *way.passes)
    else:
        is_same = attached[1] == values._version
    return attached[0] if is_same else None


def codes_anew(values: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme) -> Codes:
    """The codes of values on that grid, which were moved or selected since they were quantized: the very same codes."""
    result = kernels.fake_quantize(
        values,
        scale,
        zero_point,
        scheme.quant_min,
        scheme.quant_max,
        scheme.resolve_channel_axis(values.dim()),
        values=False,
        codes=scheme.dtype,
    )
    assert result.codes is not None and result.grid is not None
    return Codes(result.codes, result.grid)
