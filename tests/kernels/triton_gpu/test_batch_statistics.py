"""Statistics of a batch on a GPU keep their digits, whatever the values."""

from __future__ import annotations

import pytest
import torch

from mlframework.quantization import kernels
from mlframework.quantization.kernels.operators.normalization import batch_statistics

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.0, 1000.0), (1e-3, 1.0)])
@pytest.mark.parametrize("outlier", [0.0, 1000.0])
def test_against_float64(scale: float, shift: float, outlier: float) -> None:
    values = torch.randn(5000, 3) * scale + shift
    values[0] += outlier * scale
    with kernels.interpreted_kernels():
        mean, inverse = batch_statistics(values, None, None, 0.1, 0.0)
    variance, exact = torch.var_mean(values.double(), dim=0, correction=0)
    # The digits of float32: of the values, as far as they are apart.
    assert (mean - exact).abs().max() <= 1e-6 * (abs(shift) + scale)
    assert torch.allclose(inverse.double(), variance.rsqrt(), rtol=2e-5)
