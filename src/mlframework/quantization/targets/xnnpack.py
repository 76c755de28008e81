"""XNNPACK, which ExecuTorch and LiteRT run on: signed affine activations, and sums in fixed point.

It has no layer of integers with a float result: every layer's output is on a grid.
"""

from __future__ import annotations

from ..int8.xnnpack_operations import (
    FixedPointAddition,
    FloatMultiplierAverage,
    ReciprocalConcatenation,
    RoundedMultiplication,
)
from .target import AFFINE_SIGNED, Conventions, Operations, Target

XNNPACK = Target(
    AFFINE_SIGNED,
    AFFINE_SIGNED,
    has_float_results=False,
    operations=Operations(FixedPointAddition, RoundedMultiplication, ReciprocalConcatenation, FloatMultiplierAverage),
    conventions=Conventions(averages_as_layers=True, concatenates_one_grid=True),
)
