"""``fake_quantize`` against ATen, against float64, and what autograd keeps for it."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mlframework.quantization import (
    QuantizationParameters,
    QuantizationScheme,
    StraightThroughEstimator,
    fake_quantize,
    quantize,
)
from mlframework.quantization.kernels import active_path
from mlframework.quantization.qat.fake_quantize_operation import fake_quantize_tensor

SIGNED_4 = QuantizationScheme(bits=4)
PER_TENSOR_AFFINE = QuantizationScheme(bits=4, symmetric=False)
PER_CHANNEL = QuantizationScheme(bits=4, symmetric=False, channel_axis=1)


def random_case(seed: int, per_channel: bool) -> tuple[Tensor, QuantizationParameters]:
    """A tensor of random shape, and random parameters whose grid covers some of its values but not all."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = [choose.randint(1, 9) for _ in range(choose.randint(1, 4))]
    shape[0] *= choose.randint(1, 20)
    axis = choose.randrange(len(shape)) if per_channel else None
    scheme = QuantizationScheme(
        bits=choose.randint(2, 8),
        signed=choose.random() < 0.5,
        symmetric=False,
        narrow_range=choose.random() < 0.5,
        channel_axis=None if axis is None else choose.choice([axis, axis - len(shape)]),
    )
    channels = 1 if axis is None else shape[axis]
    scale = torch.exp2(torch.rand(channels, generator=generator) * 16 - 10)
    zero_point = torch.randint(scheme.quant_min, scheme.quant_max + 1, (channels,), generator=generator)
    step = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    input = torch.randn(shape, generator=generator) * step * (scheme.quant_max - scheme.quant_min) * 0.6
    return input, QuantizationParameters(scale, zero_point.to(torch.int32), scheme)


def aten(input: Tensor, parameters: QuantizationParameters) -> Tensor:
    scheme, scale, zero_point = parameters.scheme, parameters.scale, parameters.zero_point
    ends = (scheme.quant_min, scheme.quant_max)
    if scheme.channel_axis is None:
        return torch.fake_quantize_per_tensor_affine(input, scale[0], zero_point[0], *ends)
    axis = scheme.channel_axis % input.dim()
    return torch.fake_quantize_per_channel_affine(input, scale, zero_point, axis, *ends)


def along(values: Tensor, input: Tensor, scheme: QuantizationScheme) -> Tensor:
    if scheme.channel_axis is None:
        return values
    axis = scheme.channel_axis % input.dim()
    return values.reshape([-1 if i == axis else 1 for i in range(input.dim())])


def codes_of(values: Tensor, parameters: QuantizationParameters) -> Tensor:
    """The integer codes of values that lie on the grid."""
    scheme = parameters.scheme
    step = along(parameters.scale.double(), values, scheme)
    return torch.round(values.double() / step).long() + along(parameters.zero_point, values, scheme)


def test_agrees_with_aten_on_random_cases() -> None:
    elements = differing = 0
    for seed in range(240):
        input, parameters = random_case(seed, per_channel=seed % 2 == 1)
        ours, theirs = input.clone().requires_grad_(), input.clone().requires_grad_()
        values, expected = fake_quantize(ours, parameters), aten(theirs, parameters)
        upstream = torch.randn(input.shape, generator=torch.Generator().manual_seed(seed))
        values.backward(upstream)
        expected.backward(upstream)
        assert ours.grad is not None
        assert theirs.grad is not None

        difference = (codes_of(values, parameters) - codes_of(expected, parameters)).abs()
        same = difference == 0
        assert int(difference.max()) <= 1
        assert torch.equal(values[same], expected[same])
        assert torch.equal(ours.grad[same], theirs.grad[same])
        elements += input.numel()
        differing += int(difference.sum())
    # ATen multiplies by 1 / s, rounded, where the definition divides: a quotient next to a tie may fall beyond it.
    assert elements > 200_000
    assert differing <= elements / 100_000


@pytest.mark.parametrize("per_channel", [False, True])
def test_values_are_the_dequantized_codes(per_channel: bool) -> None:
    for seed in range(20):
        input, parameters = random_case(seed, per_channel)
        assert torch.equal(
            codes_of(fake_quantize(input, parameters), parameters), quantize(input, parameters).to(torch.int64)
        )


def lsq_reference(input: Tensor, parameters: QuantizationParameters, upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients of input, scale and zero point in float64, by autograd on the piecewise definition.

    Inside the grid the rounding is straight through; beyond, the value is an end of the grid.
    """
    scheme = parameters.scheme
    x, s, z = (t.detach().double().requires_grad_() for t in (input, parameters.scale, parameters.zero_point))
    step, offset = along(s, x, scheme), along(z, x, scheme)
    ratio = x / step
    rounded = ratio + (torch.round(ratio) - ratio).detach()
    codes = (torch.round(ratio) + torch.round(offset)).detach()
    values = torch.where(
        codes < scheme.quant_min,
        (scheme.quant_min - offset) * step,
        torch.where(codes > scheme.quant_max, (scheme.quant_max - offset) * step, rounded * step),
    )
    to_input, to_scale, to_zero_point = torch.autograd.grad(values, (x, s, z), upstream.double())
    factor = 1 / math.sqrt(input.numel() / parameters.scale.numel() * scheme.quant_max)
    return to_input, to_scale * factor, to_zero_point * factor


def away_from_ties(input: Tensor, parameters: QuantizationParameters) -> Tensor:
    """Moves values off the ties, where float32 and float64 may round apart."""
    step = along(parameters.scale, input, parameters.scheme).to(input.dtype)
    nearest = torch.round(input / step)
    return ((nearest + (input / step - nearest) * 0.98) * step).detach()


def learnable(parameters: QuantizationParameters, dtype: torch.dtype = torch.float32) -> QuantizationParameters:
    return QuantizationParameters(
        parameters.scale.to(dtype).requires_grad_(),
        parameters.zero_point.to(dtype).requires_grad_(),
        parameters.scheme,
    )


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    # The sums are of float32 terms (6e-8 each) in another order; in float64 only the order differs.
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12)],
)
def test_gradients_of_scale_and_zero_point(per_channel: bool, dtype: torch.dtype, tolerance: float) -> None:
    for seed in range(40):
        input, parameters = random_case(seed, per_channel)
        input = away_from_ties(input.to(dtype), parameters).requires_grad_()
        trained = learnable(parameters, dtype)
        upstream = torch.randn(input.shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        expected = lsq_reference(input, trained, upstream)
        magnitudes = lsq_magnitudes(input, trained, upstream)
        fake_quantize(input, trained).backward(upstream)
        assert input.grad is not None
        assert torch.equal(input.grad, torch.where(expected[0] != 0, upstream, 0.0))
        for parameter, reference, magnitude in zip(
            (trained.scale, trained.zero_point), expected[1:], magnitudes, strict=True
        ):
            assert parameter.grad is not None
            assert parameter.grad.shape == parameter.shape
            assert bool(((parameter.grad - reference).abs() <= tolerance * magnitude).all())


def lsq_magnitudes(input: Tensor, parameters: QuantizationParameters, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of magnitudes per channel, what rounding errors of the gradients of scale and zero point are relative to."""
    scheme = parameters.scheme
    span = scheme.quant_max - scheme.quant_min
    axes = [i for i in range(input.dim()) if scheme.channel_axis is None or i != scheme.channel_axis % input.dim()]
    total = upstream.abs().double().sum(axes).reshape(-1) if axes else upstream.abs().double()
    total = total / math.sqrt(input.numel() / parameters.scale.numel() * scheme.quant_max)
    return total * span, total * parameters.scale.detach()


@pytest.mark.parametrize("per_channel", [False, True])
def test_gradients_agree_with_atens_learnable_operator(per_channel: bool) -> None:
    for seed in range(40):
        input, parameters = random_case(seed, per_channel)
        # It refuses grids without code 0, and backward rounds a zero point by `int(z + 0.5)`: right from 0 on.
        scheme = replace(parameters.scheme, narrow_range=False)
        shifted = QuantizationParameters(parameters.scale, parameters.zero_point.clamp(min=0), scheme)
        ours, theirs = learnable(shifted), learnable(shifted)
        if per_channel and input.dim() == 1:
            continue  # its per-channel backward sums a vector to a scalar, and fails
        input = away_from_ties(input, parameters)
        left, right = input.clone().requires_grad_(), input.clone().requires_grad_()
        factor = 1 / math.sqrt(input.numel() / shifted.scale.numel() * scheme.quant_max)
        ends = (scheme.quant_min, scheme.quant_max, factor)
        if scheme.channel_axis is None:
            expected = torch._fake_quantize_learnable_per_tensor_affine(right, theirs.scale, theirs.zero_point, *ends)
        else:
            axis = scheme.channel_axis % input.dim()
            expected = torch._fake_quantize_learnable_per_channel_affine(
                right, theirs.scale, theirs.zero_point, axis, *ends
            )
        upstream = torch.randn(input.shape, generator=torch.Generator().manual_seed(seed))
        expected.backward(upstream)
        fake_quantize(left, ours).backward(upstream)
        assert left.grad is not None
        assert right.grad is not None
        assert torch.equal(left.grad, right.grad)
        magnitudes = lsq_magnitudes(input, ours, upstream)
        for name, magnitude in zip(("scale", "zero_point"), magnitudes, strict=True):
            difference = getattr(ours, name).grad - getattr(theirs, name).grad
            # Both sum float32 terms, each in its own order.
            assert bool((difference.abs() <= 1e-5 * magnitude).all())


def test_scale_gradient_of_a_worked_example() -> None:
    scale = torch.tensor([0.5], requires_grad=True)
    zero_point = torch.tensor([1.0], requires_grad=True)
    parameters = QuantizationParameters(scale, zero_point, QuantizationScheme(bits=3, symmetric=False))
    input = torch.tensor([-9.0, 0.375, 9.0, 0.5])
    fake_quantize(input, parameters).backward(torch.tensor([1.0, 1.0, 10.0, 1.0]))
    factor = 1 / math.sqrt(4 * 3)
    assert scale.grad is not None
    assert zero_point.grad is not None
    # Below: -4 - 1; inside: rne(0.75) - 0.75 and 0; above: 3 - 1. A few float32 roundings apart.
    assert scale.grad.item() == pytest.approx(factor * (-5 + 0.25 + 10 * 2), rel=1e-6)
    assert zero_point.grad.item() == pytest.approx(factor * (-0.5 - 10 * 0.5), rel=1e-6)


def test_fractional_zero_point_is_rounded_in_use() -> None:
    fractional = torch.tensor([2.6], requires_grad=True)
    scheme = QuantizationScheme(bits=4, symmetric=False)
    rounded = QuantizationParameters(torch.tensor([0.1]), torch.tensor([3.0]), scheme)
    layer_like = QuantizationParameters(torch.tensor([0.1]), torch.tensor([3.0]), scheme)
    object.__setattr__(layer_like, "zero_point", fractional)  # as training leaves it; the constructor wants a code
    input = torch.linspace(-2, 2, 101)
    assert torch.equal(fake_quantize(input, layer_like).detach(), fake_quantize(input, rounded))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channel_axis", [None, 1])
def test_computes_at_least_in_float32_and_returns_the_dtype_of_the_input(
    dtype: torch.dtype, channel_axis: int | None
) -> None:
    scheme = QuantizationScheme(symmetric=False, channel_axis=channel_axis)
    channels = 1 if channel_axis is None else 5
    scale = (torch.rand(channels) * 0.02 + 0.01).requires_grad_()
    parameters = QuantizationParameters(scale, torch.full((channels,), 7), scheme)
    input = torch.randn(64, 5).to(dtype).requires_grad_()
    values = fake_quantize(input, parameters)
    wide = input.detach().to(torch.promote_types(dtype, torch.float32))
    assert values.dtype is dtype
    assert torch.equal(values.detach(), fake_quantize(wide, parameters).detach().to(dtype))
    values.sum().backward()
    assert input.grad is not None
    assert scale.grad is not None
    assert input.grad.dtype is dtype
    assert scale.grad.dtype is torch.float32


IMAGE = torch.randn(2, 6, 4, 5)
VIEWS = {
    "contiguous": IMAGE,
    "channels_last": IMAGE.to(memory_format=torch.channels_last),
    "channels_last_3d": torch.randn(2, 6, 3, 4, 5).to(memory_format=torch.channels_last_3d),
    "transposed": IMAGE.transpose(1, 3),
    "permuted": IMAGE.permute(3, 1, 0, 2),
}
SPARSE_VIEWS = {
    "sliced": torch.randn(4, 12, 9)[::2, ::2, 1::3],
    "narrowed": IMAGE[:, 1:5],
    "expanded": torch.randn(1, 6, 1).expand(3, 6, 4),
    "scalar stride": torch.randn(1).expand(7, 6),
}


@pytest.mark.parametrize("channel_axis", [None, 1])
@pytest.mark.parametrize("name", [*VIEWS, *SPARSE_VIEWS])
def test_any_memory_format(name: str, channel_axis: int | None) -> None:
    view = {**VIEWS, **SPARSE_VIEWS}[name]
    channels = 1 if channel_axis is None else view.shape[channel_axis]
    scheme = QuantizationScheme(bits=4, channel_axis=channel_axis)
    scale = torch.linspace(0.1, 0.4, channels).requires_grad_()
    parameters = QuantizationParameters(scale, torch.zeros(channels), scheme)
    leaf = view.detach().requires_grad_()
    values = fake_quantize(leaf, parameters)
    values.sum().backward()

    plain = view.clone(memory_format=torch.contiguous_format).requires_grad_()
    again = learnable(parameters)
    expected = fake_quantize(plain, again)
    expected.sum().backward()
    assert torch.equal(values, expected)
    assert leaf.grad is not None
    assert plain.grad is not None
    assert torch.equal(leaf.grad, plain.grad)
    if name in VIEWS:
        assert values.stride() == view.stride()
    if name == "channels_last":
        assert values.is_contiguous(memory_format=torch.channels_last)
    if name == "channels_last_3d":
        assert values.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(("shape", "per_channel"), [((0,), False), ((0, 3), False), ((0, 3), True), ((4, 3, 0), True)])
def test_empty_tensor(shape: tuple[int, ...], per_channel: bool) -> None:
    scheme = QuantizationScheme(symmetric=False, channel_axis=1 if per_channel else None)
    channels = 3 if per_channel else 1
    parameters = learnable(QuantizationParameters(torch.ones(channels), torch.zeros(channels), scheme))
    input = torch.empty(shape, requires_grad=True)
    values = fake_quantize(input, parameters)
    values.sum().backward()
    assert values.shape == shape
    for gradient in (parameters.scale.grad, parameters.zero_point.grad):
        assert gradient is not None
        assert torch.equal(gradient, torch.zeros(channels))


def test_scalar_tensor() -> None:
    parameters = QuantizationParameters(torch.tensor([0.5], requires_grad=True), torch.tensor([0]), SIGNED_4)
    values = fake_quantize(torch.tensor(0.8), parameters)
    values.backward()
    assert values.shape == ()
    assert values.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_stays_and_infinity_saturates(dtype: torch.dtype) -> None:
    parameters = QuantizationParameters(torch.tensor([0.5]), torch.tensor([2]), PER_TENSOR_AFFINE)
    input = torch.tensor([math.nan, math.inf, -math.inf, 0.6], dtype=dtype, requires_grad=True)
    values = fake_quantize(input, parameters)
    values.sum().backward()
    assert math.isnan(values[0].item())
    assert values[1:].tolist() == [2.5, -5.0, 0.5]
    assert input.grad is not None
    assert input.grad.tolist() == [0, 0, 0, 1]


def test_infinities_leave_the_scale_gradient_finite() -> None:
    parameters = learnable(QuantizationParameters(torch.tensor([0.5]), torch.tensor([0]), PER_TENSOR_AFFINE))
    fake_quantize(torch.tensor([math.inf, -math.inf]), parameters).sum().backward()
    assert parameters.scale.grad is not None
    # (7 - 8) / sqrt(2 * 7), in float32.
    assert parameters.scale.grad.item() == pytest.approx(-1 / math.sqrt(14), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("channel_axis", [None, 1])
@pytest.mark.parametrize("saturated", ["zero", "identity"])
def test_autograd_keeps_the_input_and_nothing_else_of_its_size(
    dtype: torch.dtype, channel_axis: int | None, saturated: Any
) -> None:
    channels = 1 if channel_axis is None else 3
    scheme = QuantizationScheme(channel_axis=channel_axis)
    scale = torch.full((channels,), 0.1, requires_grad=True)
    parameters = QuantizationParameters(scale, torch.zeros(channels), scheme)
    input = torch.randn(50, 3).to(dtype).requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        values = fake_quantize(input, parameters, StraightThroughEstimator(saturated))
    large = [tensor for tensor in saved if tensor.numel() > channels]
    assert len(large) <= 1
    for tensor in large:
        assert tensor.data_ptr() == input.data_ptr()
        assert tensor.dtype is dtype
    values.sum().backward()
    assert input.grad is not None


def test_no_graph_without_gradients() -> None:
    parameters = QuantizationParameters(torch.tensor([0.1]), torch.tensor([0]), SIGNED_4)
    assert not fake_quantize(torch.randn(3), parameters).requires_grad


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_refuses_what_is_not_floating_point(dtype: torch.dtype) -> None:
    parameters = QuantizationParameters(torch.tensor([0.1]), torch.tensor([0]), SIGNED_4)
    with pytest.raises(TypeError, match=f"input must be a floating-point tensor, got {dtype}"):
        fake_quantize(torch.zeros(3, dtype=dtype), parameters)


def test_refuses_other_arguments() -> None:
    parameters: Any = QuantizationParameters(torch.tensor([0.1]), torch.tensor([0]), SIGNED_4)
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        fake_quantize([1.0], parameters)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parameters must be QuantizationParameters, got tuple"):
        fake_quantize(torch.zeros(2), (0.1, 0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ste must be a StraightThroughEstimator, got str"):
        fake_quantize(torch.zeros(2), parameters, "identity")  # type: ignore[arg-type]


def test_refuses_a_wrong_number_of_channels() -> None:
    parameters = QuantizationParameters(torch.ones(3), torch.zeros(3), PER_CHANNEL)
    with pytest.raises(ValueError, match=r"input must have 3 channels along axis 1.*\(2, 4\)"):
        fake_quantize(torch.zeros(2, 4), parameters)


@pytest.mark.parametrize("axis", [2, -3])
def test_refuses_an_axis_out_of_range(axis: int) -> None:
    parameters = QuantizationParameters(torch.ones(3), torch.zeros(3), QuantizationScheme(channel_axis=axis))
    with pytest.raises(ValueError, match=f"channel_axis {axis} is out of range for a tensor of 2 dimensions"):
        fake_quantize(torch.zeros(3, 3), parameters)


def test_vmap_maps_over_examples() -> None:
    parameters = QuantizationParameters(
        torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3), QuantizationScheme(channel_axis=0)
    )
    input = torch.randn(5, 3, 4)
    mapped = torch.func.vmap(lambda example: fake_quantize(example, parameters))(input)
    assert torch.equal(mapped, torch.stack([fake_quantize(example, parameters) for example in input]))


def test_gradient_of_every_example() -> None:
    scheme = QuantizationScheme(bits=3)
    input, scale = torch.randn(5, 8), torch.tensor([0.3])

    def loss(example: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(example, QuantizationParameters(scale, torch.zeros(1), scheme)).square().sum()

    to_input, to_scale = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(input, scale)
    for index, example in enumerate(input):
        leaf, step = example.clone().requires_grad_(), scale.clone().requires_grad_()
        loss(leaf, step).backward()
        torch.testing.assert_close(to_input[index], leaf.grad, rtol=0, atol=0)
        # The batched sum may add its eight float32 terms in another order.
        torch.testing.assert_close(to_scale[index], step.grad, rtol=1e-5, atol=1e-6)


def test_identity_passes_everything_to_the_input() -> None:
    parameters = learnable(QuantizationParameters(torch.tensor([0.1]), torch.tensor([0]), PER_TENSOR_AFFINE))
    input = torch.tensor([-9.0, 0.1, 9.0, math.inf], requires_grad=True)
    upstream = torch.tensor([1.0, -2.0, 3.0, 4.0])
    fake_quantize(input, parameters, StraightThroughEstimator("identity")).backward(upstream)
    assert input.grad is not None
    assert torch.equal(input.grad, upstream)


def test_identity_leaves_the_gradients_of_scale_and_zero_point_as_they_are() -> None:
    gradients = []
    input = torch.randn(100)
    for saturated in ("zero", "identity"):
        parameters = learnable(QuantizationParameters(torch.tensor([0.1]), torch.tensor([0]), PER_TENSOR_AFFINE))
        fake_quantize(input, parameters, StraightThroughEstimator(saturated)).sum().backward()
        gradients.append((parameters.scale.grad, parameters.zero_point.grad))
    assert gradients[0] == gradients[1]


def test_gradient_clip_bounds_each_element_and_what_reaches_the_scale() -> None:
    plain = learnable(QuantizationParameters(torch.tensor([0.1]), torch.tensor([0]), PER_TENSOR_AFFINE))
    clipped = learnable(plain)
    input, upstream = torch.randn(100), torch.randn(100) * 3
    left, right = input.clone().requires_grad_(), input.clone().requires_grad_()
    fake_quantize(left, clipped, StraightThroughEstimator(gradient_clip=0.5)).backward(upstream)
    fake_quantize(right, plain).backward(upstream.clamp(-0.5, 0.5))
    assert left.grad is not None
    assert right.grad is not None
    assert torch.equal(left.grad, right.grad)
    assert float(left.grad.abs().max()) == 0.5
    assert clipped.scale.grad == plain.scale.grad
    assert clipped.zero_point.grad == plain.zero_point.grad


def test_two_backwards_through_one_graph() -> None:
    parameters = QuantizationParameters(torch.tensor([0.1]), torch.tensor([0]), SIGNED_4)
    input = torch.randn(10, requires_grad=True)
    values = fake_quantize(input, parameters)
    (first,) = torch.autograd.grad(values.sum(), input, retain_graph=True)
    (second,) = torch.autograd.grad(values.sum(), input)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fixed_scale_leaves_one_bit_an_element_for_backward(dtype: torch.dtype) -> None:
    parameters = QuantizationParameters(torch.tensor([0.1]), torch.tensor([0]), SIGNED_4)
    input = torch.randn(40, 20).to(dtype).requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        values = fake_quantize(input, parameters)
    assert [tensor.nbytes for tensor in saved] == [100]
    upstream = torch.randn(40, 20).to(dtype)
    values.backward(upstream)
    codes = (input.detach().float() / parameters.scale).round()
    assert input.grad is not None
    assert torch.equal(input.grad, torch.where((codes >= -8) & (codes <= 7), upstream, 0.0))


@pytest.mark.parametrize("native", [True, False])
def test_a_fixed_scale_may_change_before_backward(native: bool) -> None:
    """As an observer changes it at the end of a model's forward."""
    input = torch.randn(100).to(torch.float32 if native else torch.float64).requires_grad_()
    scale, zero_point = torch.tensor([0.1]), torch.zeros(1)
    values, _, _ = fake_quantize_tensor(input, scale, zero_point, SIGNED_4, StraightThroughEstimator(), None)
    (expected,) = torch.autograd.grad(values.sum(), input, retain_graph=True)
    scale.fill_(1e-3)
    assert torch.equal(torch.autograd.grad(values.sum(), input)[0], expected)
    assert 0 < int(expected.count_nonzero()) < 100


@pytest.mark.parametrize("learned", [False, True])
def test_codes_come_with_the_values_and_take_no_gradient(learned: bool) -> None:
    scale = torch.tensor([0.1], requires_grad=learned)
    for input in (torch.randn(7, 5, requires_grad=True), torch.randn(7, 5), torch.randn(7, 5).half()):
        arguments = (scale, torch.zeros(1), SIGNED_4, StraightThroughEstimator(), None)
        values, codes, grid = fake_quantize_tensor(input, *arguments, codes=True)
        if input.dtype is torch.float16 or active_path() == "reference":
            assert codes is None, "where no compiled kernel runs"
        else:
            assert codes is not None
            assert codes.dtype is torch.int8
            assert not codes.requires_grad
            assert torch.equal(values, codes * scale)
            assert grid is not None
            assert torch.equal(grid, torch.tensor([[0.1], [0.0]]))
        assert torch.equal(values, fake_quantize_tensor(input, *arguments)[0])
        if values.requires_grad:
            values.sum().backward()  # type: ignore[no-untyped-call]
        broken = input.detach().clone().index_fill_(0, torch.tensor([3]), math.nan).requires_grad_(input.requires_grad)
        values, codes, grid = fake_quantize_tensor(broken, *arguments, codes=True)
        assert torch.equal(values.isnan(), broken.isnan())
        if grid is not None:
            assert grid[0].isnan().all(), "whatever is computed with the codes is NaN"


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("gradient_clip", [None, 0.5])
def test_a_gradient_of_a_gradient(learned: bool, gradient_clip: float | None) -> None:
    """The compiled kernels' first gradient is as differentiable as that of PyTorch's operations."""
    ste = StraightThroughEstimator(gradient_clip=gradient_clip)

    def second(input: Tensor) -> tuple[Tensor, ...]:
        input = input.detach().requires_grad_()
        scale = torch.tensor(
            [0.1], dtype=torch.float64 if input.dtype is torch.float64 else None, requires_grad=learned
        )
        zero_point = torch.zeros_like(scale).detach()
        values, _, _ = fake_quantize_tensor(input, scale, zero_point, SIGNED_4, ste, None)
        leaves = (input, scale) if learned else (input,)
        first = torch.autograd.grad((values**2).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    input = torch.randn(50)
    for one, other in zip(second(input), second(input.double()), strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-4)  # float32 against float64
    assert second(input)[0].count_nonzero() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of PyTorch, in make_dual
def test_forward_mode_is_refused_and_not_silently_dropped() -> None:
    parameters = QuantizationParameters(torch.tensor([0.1]), torch.tensor([0]), SIGNED_4)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        fake_quantize(torch.autograd.forward_ad.make_dual(torch.randn(3), torch.ones(3)), parameters)
