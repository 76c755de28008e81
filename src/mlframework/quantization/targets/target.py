"""What there is to know of a deployment engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ..int8.average_pooling import AveragePooling
from ..int8.integer_operation import Addition, Concatenation, Multiplication
from ..scheme import QuantizationScheme

AFFINE_UNSIGNED = QuantizationScheme(signed=False, symmetric=False)
NON_NEGATIVE = QuantizationScheme(signed=False, symmetric=True)
AFFINE_SIGNED = QuantizationScheme(signed=True, symmetric=False)
SYMMETRIC_SIGNED = QuantizationScheme(signed=True, symmetric=True)
WEIGHT = QuantizationScheme(narrow_range=True, channel_axis=0)


@dataclass(frozen=True)
class Operations:
    """What an engine computes for operations that have more than one integer form; by default what ONNX Runtime does,
    which OpenVINO and TensorRT, whose formulas are not published, come near."""

    addition: type[Addition] = Addition
    multiplication: type[Multiplication] = Multiplication
    concatenation: type[Concatenation] = Concatenation
    average_pooling: type[AveragePooling] = AveragePooling


@dataclass(frozen=True)
class Conventions:
    """How a file is written.

    Attributes:
        exact: for ONNX Runtime, integer for integer: whatever its fused operators compute in floats or leave in floats
            is written as operations on codes. Otherwise float operations between quantize and dequantize nodes
            throughout, which is what engines' pattern matchers look for.
        own_nodes_for_sums: a sum whose operand other operations read as well gets a quantize node of its own.
        unsigned_concatenations: int8 codes of a concatenation are written 128 higher, as uint8. OpenVINO (2026.4)
            computes a convolution of the signed ones wrongly.
        averages_as_layers: averages are written as linear layers and depthwise convolutions with weights of one.
        flattens_images: whether a mean over images may flatten them for that, which takes images of a fixed size.
        concatenates_one_grid: what is concatenated is brought to one grid before.
    """

    exact: bool = False
    own_nodes_for_sums: bool = False
    unsigned_concatenations: bool = False
    averages_as_layers: bool = False
    flattens_images: bool = True
    concatenates_one_grid: bool = False


@dataclass(frozen=True)
class Target:
    """An engine's grids, arithmetic and files.

    Attributes:
        activation: per tensor, for values of either sign.
        non_negative_activation: per tensor, after a ReLU and the like. Engines fuse the ReLU into the layer before it
            where its zero point is the lowest code.
        weight: per channel; the axis is the layer's.
        stored_bits: the narrowest integers that its files store and its kernels multiply. Codes of fewer bits lie in
            these: all engines take int8.
        has_float_results: whether a linear layer on integers may return floats; otherwise its output is put on a grid.
        operations: the integer forms that it has.
        file_format: ``"onnx"``, ``"pte"`` for ExecuTorch's programs, or ``"tflite"`` for LiteRT's models.
        has_dynamic_shapes: whether its files may take axes of any size.
        conventions: how its files are written.
    """

    activation: QuantizationScheme
    non_negative_activation: QuantizationScheme
    weight: QuantizationScheme = WEIGHT
    stored_bits: int = 8
    has_float_results: bool = True
    operations: Operations = field(default_factory=Operations)
    file_format: Literal["onnx", "pte", "tflite"] = "onnx"
    has_dynamic_shapes: bool = True
    conventions: Conventions = field(default_factory=Conventions)

    def with_bits(self, activation_bits: int, weight_bits: int) -> Target:
        """The same grids with fewer codes."""
        return replace(
            self,
            activation=replace(self.activation, bits=activation_bits),
            non_negative_activation=replace(self.non_negative_activation, bits=activation_bits),
            weight=replace(self.weight, bits=weight_bits),
        )
