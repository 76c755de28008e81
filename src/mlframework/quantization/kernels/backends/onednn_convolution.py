"""PyTorch's oneDNN convolution of uint8 by int8 codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import ConvolutionGeometry


class OnednnConvolution:
    """Sums of a 2-d convolution of uint8 codes, as float32: with unit scales they are the output itself.

    Exact below 2**24, on a processor that :func:`.capability.onednn_is_exact` approves.

    Args:
        weight: codes of shape (O, I / groups, height, width), int8.
        zero_point: the input's.
        geometry: stride, padding, dilation, groups.

    Raises:
        RuntimeError: this build of PyTorch has no such kernel.
    """

    def __init__(self, weight: Tensor, zero_point: int, geometry: ConvolutionGeometry) -> None:
        channels = weight.shape[0]
        self.zero_point = zero_point
        self.geometry = geometry
        self.scales = torch.ones(channels)
        self.zero_points = torch.zeros(channels, dtype=torch.int32)
        self.packed: Tensor = torch.ops.onednn.qconv_prepack(
            weight.contiguous(), self.scales, 1.0, zero_point, *geometry, None
        )
        self.operator = torch.ops.onednn.qconv_pointwise.default

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes (N, I, H, W), uint8, to sums (N, O, H', W')."""
        sums: Tensor = self.operator(
            codes,
            1.0,
            self.zero_point,
            self.packed,
            self.scales,
            self.zero_points,
            None,
            *self.geometry,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return sums
