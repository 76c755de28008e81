"""How a gradient passes a rounding, whose own derivative is zero almost everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StraightThroughEstimator:
    r"""The identity through the rounding (Bengio et al., 2013, arXiv:1308.3432).

    With incoming gradient :math:`g`, clipped to :math:`\bar g = \mathrm{clamp}(g, -c, c)`:

    .. math:: \frac{\partial L}{\partial x} = \bar g \cdot
              [q_{min} \le \mathrm{rne}(x / s) + z \le q_{max}]

    Args:
        saturated: what passes where the value saturated: ``"zero"`` (the equation above, the gradient of the clamp)
            or ``"identity"`` (everything passes).
        gradient_clip: the largest magnitude :math:`c` that passes, per element, against exploding gradients; also
            applied to what reaches the scale and the zero point. ``None`` clips nothing.

    Raises:
        ValueError: ``saturated`` is neither, or ``gradient_clip`` is not finite and positive.

    Example:
        >>> StraightThroughEstimator(gradient_clip=1.0)
        StraightThroughEstimator(saturated='zero', gradient_clip=1.0)
    """

    saturated: Literal["zero", "identity"] = "zero"
    gradient_clip: float | None = None

    def __post_init__(self) -> None:
        if self.saturated not in ("zero", "identity"):
            raise ValueError(f"saturated must be 'zero' or 'identity', got {self.saturated!r}")
        clip = self.gradient_clip
        number = isinstance(clip, (int, float)) and not isinstance(clip, bool)
        if clip is not None and not (number and math.isfinite(clip) and clip > 0):
            raise ValueError(f"gradient_clip must be a finite positive number or None, got {clip!r}")
