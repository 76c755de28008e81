"""Folding against batch normalization in float64, and the channels that other libraries turn into NaN."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mlframework.quantization import QuantizationScheme, arithmetic
from mlframework.quantization.int8.folding import BatchNorm, IntegerWeights, fold

NARROW = QuantizationScheme(narrow_range=True, channel_axis=0)
INPUT_SCALE = torch.tensor([0.037])
CHANNELS = 5
LAYERS = [
    (nn.Linear(8, CHANNELS), nn.BatchNorm1d(CHANNELS), (6, 8), 0),
    (nn.Conv1d(3, CHANNELS, 3), nn.BatchNorm1d(CHANNELS), (2, 3, 9), 0),
    (nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), (2, 3, 6, 6), 0),
    (nn.Conv3d(2, CHANNELS, 2), nn.BatchNorm3d(CHANNELS), (2, 2, 4, 4, 4), 0),
    (nn.ConvTranspose2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), (2, 3, 6, 6), 1),
]
NAMES = [type(layer).__name__ for layer, *_ in LAYERS]


def batch_norm_1d(gamma: list[float], beta: float = 0.5, variance: float = 1.0) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(len(gamma)).eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(gamma))
        norm.bias.fill_(beta)
        norm.running_mean.fill_(0.25)
        norm.running_var.fill_(variance)
    return norm


def fold_linear(
    codes: Tensor, norm: BatchNorm | None, bias: Tensor | None = None, scale: float = 0.01
) -> IntegerWeights:
    return fold(codes, torch.full((codes.shape[0],), scale), NARROW, bias, INPUT_SCALE, norm)


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def outputs_of(layer: nn.Module, weight: Tensor, values: Tensor) -> Tensor:
    """The layer's operation in float64 without a bias."""
    layer = copy.deepcopy(layer).double()
    assert isinstance(layer.weight, Tensor)
    layer.bias = None
    with torch.no_grad():
        layer.weight.copy_(weight)
        result: Tensor = layer(values)
    return result


@pytest.mark.parametrize(("layer", "norm", "shape", "axis"), LAYERS, ids=NAMES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_folded_integers_are_batch_norm_after_the_layer(
    layer: nn.Module, norm: BatchNorm, shape: tuple[int, ...], axis: int, with_bias: bool, affine: bool
) -> None:
    assert isinstance(layer.weight, Tensor)
    codes, scale, bias = random_codes(*layer.weight.shape), torch.rand(CHANNELS) * 0.01 + 1e-3, torch.randn(CHANNELS)
    norm = type(norm)(CHANNELS, affine=affine).eval()
    for name, values in norm.named_buffers():
        if name != "num_batches_tracked":
            values.copy_(torch.rand(CHANNELS) + 0.1)
    for values in norm.parameters():
        nn.init.normal_(values)
    sums_shape = [-1] + [1] * (len(shape) - 2)
    inputs = torch.randint(-128, 128, shape).double()

    folded = fold(codes, scale, NARROW, bias if with_bias else None, INPUT_SCALE, norm, axis)
    result = outputs_of(layer, folded.codes, inputs) + folded.bias.view(sums_shape)
    result = result * (INPUT_SCALE.double() * folded.scale.double()).view(sums_shape)

    real_weight = codes * arithmetic.along_axis(scale.double(), codes.dim(), axis)
    products = outputs_of(layer, real_weight, inputs * INPUT_SCALE.double())
    magnitude = outputs_of(layer, real_weight.abs(), inputs.abs() * INPUT_SCALE.double())
    biased = products + bias.double().view(sums_shape) if with_bias else products
    with torch.no_grad():
        expected = copy.deepcopy(norm).double()(biased)
    ratio = (folded.scale.double() / scale.double()).view(sums_shape)
    # Half a step of the bias, and the float32 roundings of the scale, of the offset and of its quotient.
    step = (INPUT_SCALE.double() * folded.scale.double()).view(sums_shape)
    offset = (folded.bias * INPUT_SCALE.double() * folded.scale.double()).abs().view(sums_shape)
    bound = 0.5001 * step + 2.0**-22 * (magnitude * ratio + offset)
    assert torch.all((result - expected).abs() <= bound)


def test_without_batch_norm_only_the_bias_changes() -> None:
    codes, bias = random_codes(4, 8), torch.randn(4)
    folded = fold(codes, torch.tensor([0.02]), NARROW, bias, INPUT_SCALE, None)
    assert torch.equal(folded.codes, codes)
    assert torch.equal(folded.scale, torch.full((4,), 0.02))
    assert torch.equal(folded.bias, arithmetic.quantize_bias(bias, INPUT_SCALE * torch.tensor([0.02])))
    assert torch.equal(fold_linear(codes, None).bias, torch.zeros(4, dtype=torch.int32))


def test_codes_stay_but_for_the_sign() -> None:
    codes = random_codes(3, 8)
    folded = fold_linear(codes, batch_norm_1d([2.0, -2.0, -0.5]))
    assert torch.equal(folded.codes, codes * torch.tensor([[1], [-1], [-1]], dtype=torch.int8))
    assert folded.scale[0] == folded.scale[1] > folded.scale[2] > 0
    assert folded.codes.dtype is torch.int8
    assert folded.scale.dtype is torch.float32
    assert folded.bias.dtype is torch.int32


def test_negated_lowest_code_saturates() -> None:
    codes = torch.tensor([[-128, -127, 127]], dtype=torch.int8)
    folded = fold(codes, torch.ones(1), QuantizationScheme(), None, INPUT_SCALE, batch_norm_1d([-1.0]))
    assert folded.codes.tolist() == [[127, 127, -127]]


def test_zero_gamma_is_a_constant_channel() -> None:
    folded = fold_linear(random_codes(2, 8), batch_norm_1d([0.0, 1.0], beta=0.75), bias=torch.tensor([9.0, 9.0]))
    assert torch.equal(folded.codes[0], torch.zeros(8, dtype=torch.int8))
    step = INPUT_SCALE * folded.scale[0]
    # Rounded to the accumulator's steps.
    assert abs(folded.bias[0] * step - 0.75) <= 0.5001 * step


@pytest.mark.parametrize("gamma", [1e-6, -1e-6, 1e-10, 1e-20, 1e-40])
def test_tiny_gamma_raises_the_scale(gamma: float) -> None:
    codes = random_codes(2, 8)
    norm = batch_norm_1d([gamma, 1.0], beta=300.0)
    folded = fold_linear(codes, norm)
    assert folded.scale[0] > 0.01 * abs(gamma) / 1.0001
    inputs = torch.randint(-128, 128, (20, 8)).double()
    result = inputs @ folded.codes.double().t() + folded.bias
    result = result * (INPUT_SCALE.double() * folded.scale.double())
    with torch.no_grad():
        expected = copy.deepcopy(norm).double()((inputs * INPUT_SCALE.double()) @ (codes.double() * 0.01).t())
    step = (INPUT_SCALE * folded.scale).double()
    # Every weight moves by at most half a step of its raised scale; the bias, 300, is a float32 number.
    bound = step * (0.5001 * inputs.abs().sum(dim=1, keepdim=True) + 1) + 2.0**-22 * 300
    assert torch.all((result - expected).abs()[:, 0] <= bound[:, 0])


@given(
    gamma=st.sampled_from([0.0, 1e-45, -1e-38, 1e-20, -1e-12, 1e-6, -0.1, 1.0, -1e3, 1e6]),
    beta=st.sampled_from([0.0, 1e-30, -1.0, 1e4, -1e10]),
    variance=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e12]),
    scale=st.sampled_from([2.0**-40, 1e-6, 0.1, 100.0]),
    bias=st.sampled_from([0.0, 1.0, -1e8]),
)
def test_whatever_the_statistics_all_stays_finite(
    gamma: float, beta: float, variance: float, scale: float, bias: float
) -> None:
    codes = torch.tensor([[-127, -1, 0, 1, 127]], dtype=torch.int8)
    folded = fold_linear(codes, batch_norm_1d([gamma], beta, variance), torch.tensor([bias]), scale)
    assert torch.isfinite(folded.scale).all()
    assert folded.scale.item() >= arithmetic.SMALLEST_SCALE
    # The quotient that makes the bias is within float32 rounding of the limit that the scale was raised for.
    assert abs(folded.bias.item()) <= arithmetic.LARGEST_BIAS_CODE * (1 + 2.0**-20)
    assert folded.codes.abs().max() <= 127
    assert torch.equal(folded.codes.flip(1), -folded.codes)


@pytest.mark.parametrize("bias", [1e6, -1e30])
def test_large_bias_without_batch_norm_never_overflows(bias: float) -> None:
    folded = fold_linear(random_codes(1, 8), None, torch.tensor([bias]), scale=1e-9)
    # Float32 rounding of the raised scale, as above.
    torch.testing.assert_close(folded.bias.abs().item(), arithmetic.LARGEST_BIAS_CODE, rtol=2.0**-20, atol=0)
    assert (folded.bias.item() > 0) == (bias > 0)


def test_folding_leaves_its_arguments_alone() -> None:
    codes, scale, norm = random_codes(2, 4), torch.tensor([0.1, 0.2]), batch_norm_1d([-1.0, 1e-20])
    before = codes.clone(), scale.clone(), copy.deepcopy(norm.state_dict())
    folded = fold(codes, scale, NARROW, None, INPUT_SCALE, norm)
    assert torch.equal(codes, before[0])
    assert torch.equal(scale, before[1])
    assert all(torch.equal(value, before[2][name]) for name, value in norm.state_dict().items())
    assert not any(tensor.requires_grad for tensor in (folded.codes, folded.scale, folded.bias))
