"""What each deployment engine takes: the grids of its activations and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..scheme import QuantizationScheme

_AFFINE_UNSIGNED = QuantizationScheme(signed=False, symmetric=False)
_NON_NEGATIVE = QuantizationScheme(signed=False, symmetric=True)
_AFFINE_SIGNED = QuantizationScheme(signed=True, symmetric=False)
_SYMMETRIC_SIGNED = QuantizationScheme(signed=True, symmetric=True)
_WEIGHT = QuantizationScheme(narrow_range=True, channel_axis=0)


@dataclass(frozen=True)
class Target:
    """An engine's grids.

    Attributes:
        activation: per tensor, for values of either sign.
        non_negative_activation: per tensor, after a ReLU and the like. Engines fuse the ReLU into the layer before it
            where its zero point is the lowest code.
        weight: per channel; the axis is the layer's.
        stored_bits: the narrowest integers that its files store and its kernels multiply. Codes of fewer bits lie in
            these: all engines take int8.
    """

    activation: QuantizationScheme
    non_negative_activation: QuantizationScheme
    weight: QuantizationScheme = _WEIGHT
    stored_bits: int = 8

    def with_bits(self, activation_bits: int, weight_bits: int) -> Target:
        """The same grids with fewer codes."""
        return replace(
            self,
            activation=replace(self.activation, bits=activation_bits),
            non_negative_activation=replace(self.non_negative_activation, bits=activation_bits),
            weight=replace(self.weight, bits=weight_bits),
        )


TARGETS = {
    "onnxruntime": Target(_AFFINE_UNSIGNED, _NON_NEGATIVE),
    "openvino": Target(_SYMMETRIC_SIGNED, _NON_NEGATIVE),
    "tensorrt": Target(_SYMMETRIC_SIGNED, _SYMMETRIC_SIGNED),
    "executorch": Target(_AFFINE_SIGNED, _AFFINE_SIGNED),
}
