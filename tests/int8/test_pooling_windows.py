"""Windows of average poolings lie where PyTorch lays them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mlframework.quantization.int8.pooling_windows import cover_everything, divisors, windows_of


def averages(pooling: nn.AvgPool1d | nn.AdaptiveAvgPool1d, x: Tensor) -> Tensor:
    (windows,) = windows_of(pooling, [x.shape[-1]])
    sums = [x[..., start:end].sum(-1) for start, end in zip(windows.starts, windows.ends, strict=True)]
    return torch.stack(sums, -1) / divisors(pooling, [windows])


@given(
    size=st.integers(1, 12),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    padding=st.integers(0, 2),
    ceil_mode=st.booleans(),
    count_include_pad=st.booleans(),
)
def test_fixed_windows(
    size: int, kernel: int, stride: int, padding: int, ceil_mode: bool, count_include_pad: bool
) -> None:
    padding = min(padding, kernel // 2)
    if size + 2 * padding < kernel:
        return
    pooling = nn.AvgPool1d(kernel, stride, padding, ceil_mode, count_include_pad)
    x = torch.randn(2, 3, size, dtype=torch.float64)
    assert torch.allclose(averages(pooling, x), pooling(x))
    (windows,) = windows_of(pooling, [size])
    if windows.strided is not None:
        assert windows.strided == (kernel, stride, padding)
        assert len(windows.starts) == (size + 2 * padding - kernel) // stride + 1


@given(size=st.integers(1, 12), target=st.one_of(st.none(), st.integers(1, 14)))
def test_adaptive_windows(size: int, target: int | None) -> None:
    pooling = nn.AdaptiveAvgPool1d(target)  # type: ignore[arg-type]
    x = torch.randn(2, 3, size, dtype=torch.float64)
    expected = x if target is None else pooling(x)
    assert torch.allclose(averages(pooling, x), expected)
    (windows,) = windows_of(pooling, [size])
    assert (windows.strided is not None) == (target is None or size % target == 0)


def test_two_dimensions() -> None:
    pooling = nn.AvgPool2d((2, 3), (1, 2), (1, 0), count_include_pad=False)
    counts = divisors(pooling, windows_of(pooling, [4, 7]))
    expected = nn.AvgPool2d((2, 3), (1, 2), (1, 0), divisor_override=1)(torch.ones(1, 1, 4, 7))[0, 0]
    assert torch.equal(counts.float(), expected)
    overridden = nn.AvgPool2d(2, divisor_override=5)
    assert (divisors(overridden, windows_of(overridden, [4, 4])) == 5).all()


def test_windows_that_cover_everything() -> None:
    for pooling, covers in ((nn.AdaptiveAvgPool2d(1), True), (nn.AvgPool2d((4, 6)), True), (nn.AvgPool2d(4), False)):
        assert cover_everything(windows_of(pooling, [4, 6]), [4, 6]) is covers
    assert not cover_everything(windows_of(nn.AvgPool1d(4, padding=1), [4]), [4])
