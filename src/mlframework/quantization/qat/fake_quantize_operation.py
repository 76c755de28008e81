"""``fake_quantize``: the quantization noise of the grid in the forward pass, float gradients in the backward pass."""

from __future__ import annotations

from torch import Tensor

from ..kernels.differentiable.fake_quantize import Options, fake_quantize_with_codes
from ..parameters import QuantizationParameters, check_input
from ..scheme import QuantizationScheme
from .straight_through_estimator import StraightThroughEstimator


def fake_quantize_tensor(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantizationScheme,
    ste: StraightThroughEstimator,
    axis: int | None,
    *,
    codes: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`fake_quantize` on checked arguments: what the layers call in every step.

    A scale or a zero point that does not require grad may be updated in place before backward runs.

    Args:
        codes: also return the codes, in the dtype of the scheme and without a gradient, and their grid
            (:class:`.FakeQuantized`), where layers compute on them.
    """
    options = Options(scheme.quant_min, scheme.quant_max, axis, ste.saturated == "identity", ste.gradient_clip)
    return fake_quantize_with_codes(input, scale, zero_point, options, scheme.dtype if codes else None)


def fake_quantize(
    input: Tensor, parameters: QuantizationParameters, ste: StraightThroughEstimator | None = None
) -> Tensor:
    r"""Rounds to the grid and stays differentiable: the quantization noise that training learns to bear.

    .. math:: y = (\mathrm{clamp}(\mathrm{rne}(x / s) + z,\ q_{min},\ q_{max}) - z)\, s

    Gradients, with :math:`q = \mathrm{rne}(x / s) + z` and :math:`g = 1 / \sqrt{N Q_p}` (N elements share one scale,
    :math:`Q_p = q_{max}`):

    - input: the straight-through estimator's.
    - scale, where it requires grad (LSQ: Esser et al., 2020, arXiv:1902.08153, equations 3 and 4):
      :math:`g\,(\mathrm{rne}(x / s) - x / s)` inside the grid, :math:`g\,(q_{min} - z)` below it,
      :math:`g\,(q_{max} - z)` above.
    - zero point, where it requires grad (LSQ+: Bhalgat et al., 2020, arXiv:2004.09576, section 3.2): :math:`0` inside
      the grid, :math:`-g\,s` where the value saturated. A fractional zero point is rounded in use, straight through.

    NaN stays NaN; infinities saturate.

    Args:
        input: floating-point tensor of any shape and memory format. Half precision computes in float32.
        parameters: scale, zero point and grid.
        ste: what passes backward; the default estimator where not given.

    Returns:
        Values on the grid: shape, dtype and memory format of ``input``.

    Raises:
        TypeError: ``input`` is not floating point, or an argument is not of its type.
        ValueError: the shape does not fit ``parameters``.

    Example:
        >>> scale = torch.tensor([0.5], requires_grad=True)
        >>> parameters = QuantizationParameters(scale, torch.tensor([0]), QuantizationScheme(bits=2))
        >>> x = torch.tensor([-3.0, 0.3, 0.2], requires_grad=True)
        >>> y = fake_quantize(x, parameters)
        >>> y.detach()
        tensor([-1.0000,  0.5000,  0.0000])
        >>> y.sum().backward()
        >>> x.grad
        tensor([0., 1., 1.])
    """
    if ste is None:
        ste = StraightThroughEstimator()
    elif not isinstance(ste, StraightThroughEstimator):
        raise TypeError(f"ste must be a StraightThroughEstimator, got {type(ste).__name__}")
    axis = check_input(input, parameters)
    return fake_quantize_tensor(input, parameters.scale, parameters.zero_point, parameters.scheme, ste, axis)[0]
