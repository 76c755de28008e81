r"""Exact sums :math:`\sum (q_x - z_x)\, q_w` of linear layers and convolutions, with weights packed once.

Each class takes the weights at construction and maps codes to sums, on the fastest path that is exact on their device:
an integer kernel that a probe approves, else exact floats (:mod:`.exact_floats`), which ``torch.compile`` traces too.

With ``followed_by(epilogue)`` they become whole layers, which compiled kernels may run in one step.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .capability import int_mm_is_best, onednn_is_exact
from .exact_floats import exact_blocks, largest_sum, sums_in_floating_point
from .integer_layer import Convolution2d, Epilogue, IntegerLayer
from .onednn import ConvolutionGeometry, OnednnConvolution


class PackedLinear:
    """Sums of a linear layer.

    Args:
        weight: codes of shape (out_features, in_features), int8.
        zero_point: the input's.
        dtype: of the input's codes, ``torch.int8`` or ``torch.uint8``.
    """

    channel_axis = -1

    def __init__(self, weight: Tensor, zero_point: int, dtype: torch.dtype) -> None:
        self.weight = weight
        self.zero_point = zero_point
        self.dtype = dtype
        self.bound = largest_sum(weight, zero_point, dtype)
        self.blocks = exact_blocks(weight, zero_point, dtype, self.bound)
        # The kernel multiplies int8 by int8: uint8 codes are lowered by 128, and the rows of the weight make up
        # for that together with the zero point.
        self.unsigned = dtype is torch.uint8
        offset = (128 if self.unsigned else 0) - zero_point
        self.correction = weight.sum(dim=1, dtype=torch.int32) * offset if offset else None
        self.use_int_mm = int_mm_is_best(weight.device.type)

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes (*, in_features) to sums (*, out_features)."""
        rows = codes.reshape(-1, codes.shape[-1])
        if self._kernel_takes(rows):
            signed = (rows ^ 128).view(torch.int8) if self.unsigned else rows
            sums = torch._int_mm(signed, self.weight.t())
            if self.correction is not None:
                sums += self.correction
        else:
            sums = sums_in_floating_point(F.linear, rows, self.zero_point, self.weight, self.blocks)
        return sums.reshape(*codes.shape[:-1], sums.shape[-1])

    def _kernel_takes(self, rows: Tensor) -> bool:
        if not self.use_int_mm or rows.shape[0] == 0 or torch.compiler.is_compiling():
            return False
        # CUDA's wants more than 16 rows, and both sides of the weight in multiples of 8.
        return not rows.is_cuda or (rows.shape[0] > 16 and all(size % 8 == 0 for size in self.weight.shape))

    def as_convolution(self) -> Convolution2d:
        """The 1 x 1 convolution that sums the same."""
        return Convolution2d(self.weight[:, :, None, None], ConvolutionGeometry((1, 1), (0, 0), (1, 1)))

    def followed_by(self, epilogue: Epilogue) -> IntegerLayer:
        """The layer that does this to the sums."""
        return IntegerLayer(self, epilogue)


class PackedConvolution:
    """Sums of a 1-d, 2-d or 3-d convolution.

    Args:
        weight: codes of shape (O, I / groups, *kernel), int8.
        zero_point, dtype: of the input's codes.
        geometry: stride, padding, dilation, groups.
    """

    channel_axis = 1

    def __init__(self, weight: Tensor, zero_point: int, dtype: torch.dtype, geometry: ConvolutionGeometry) -> None:
        self.weight = weight
        self.zero_point = zero_point
        self.dtype = dtype
        self.geometry = geometry
        self.bound = largest_sum(weight, zero_point, dtype)
        blocks = exact_blocks(weight, zero_point, dtype, self.bound)
        self.blocks = blocks if len(blocks) == 1 or geometry.groups == 1 else []
        # oneDNN takes uint8 activations only; an int8 code becomes the uint8 code 128 above it.
        self.signed = dtype is torch.int8

    @functools.cached_property
    def packed(self) -> list[tuple[slice, OnednnConvolution]]:
        """The blocks in oneDNN, which sums in float32; empty where there are none, or its sums are inexact."""
        if self.weight.device.type != "cpu" or self.weight.dim() != 4 or not onednn_is_exact():
            return []
        zero_point = self.zero_point + 128 if self.signed else self.zero_point
        return [(block, OnednnConvolution(self.weight[:, block], zero_point, self.geometry)) for block in self.blocks]

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes (N, I, *size) to sums (N, O, *size)."""
        if not torch.compiler.is_compiling() and codes.numel() > 0 and self.packed:
            unsigned = codes.view(torch.uint8) ^ 128 if self.signed else codes
            if len(self.packed) == 1:
                return self.packed[0][1](unsigned)
            sums = [convolution(unsigned[:, block]).to(torch.int32) for block, convolution in self.packed]
            return torch.stack(sums).sum(dim=0, dtype=torch.int32)
        convolution = (F.conv1d, F.conv2d, F.conv3d)[self.weight.dim() - 3]
        return sums_in_floating_point(
            lambda values, weight: convolution(values, weight, None, *self.geometry),
            codes,
            self.zero_point,
            self.weight,
            self.blocks,
        )

    def as_convolution(self) -> Convolution2d | None:
        """This one, if it is 2-d, or 1-d as one that is a row high; None in 3-d."""
        stride, padding, dilation, groups = self.geometry
        if self.weight.dim() == 3:
            geometry = ConvolutionGeometry((1, *stride), (0, *padding), (1, *dilation), groups)
            return Convolution2d(self.weight.unsqueeze(2), geometry)
        return Convolution2d(self.weight, self.geometry) if self.weight.dim() == 4 else None

    def followed_by(self, epilogue: Epilogue) -> IntegerLayer:
        """The layer that does this to the sums."""
        return IntegerLayer(self, epilogue)
