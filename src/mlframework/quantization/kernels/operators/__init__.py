"""Every operator, declared once (:mod:`.declaration`): schema, reference in PyTorch's operations, fake form."""

from . import (
    codes,
    fake_quantization,
    fingerprints,
    integer_layers,
    moving_average,
    normalization,
    snapshot,
    training_layers,
)

__all__ = [
    "codes",
    "fake_quantization",
    "fingerprints",
    "integer_layers",
    "moving_average",
    "normalization",
    "snapshot",
    "training_layers",
]
