"""The layer: its state from construction on, what it learns, saves, wraps and refuses."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import (
    FakeQuantizeLayer,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
    QuantizationParameters,
    QuantizationScheme,
    StraightThroughEstimator,
    fake_quantize,
    kernels,
)

AFFINE = QuantizationScheme(bits=4, signed=False, symmetric=False)
PER_CHANNEL = QuantizationScheme(narrow_range=True, channel_axis=1)

either_kind = pytest.mark.parametrize("learnable", [False, True], ids=["observed", "learnable"])


def trained_layer(scheme: QuantizationScheme = AFFINE, **options: Any) -> FakeQuantizeLayer:
    layer = FakeQuantizeLayer(scheme, **options)
    layer(torch.randn(50, options.get("num_channels", 1)))
    return layer


def expected_values(input: Tensor, layer: FakeQuantizeLayer) -> Tensor:
    return fake_quantize(input, layer.parameters_on_grid, layer.estimator).detach()


def snapshot_of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("scheme", [QuantizationScheme(), AFFINE, PER_CHANNEL], ids=str)
def test_learnable_and_observed_have_the_same_state(scheme: QuantizationScheme) -> None:
    channels = 1 if scheme.channel_axis is None else 3
    observed, learnable = (FakeQuantizeLayer(scheme, learnable=kind, num_channels=channels) for kind in (False, True))
    assert_same_state(observed.state_dict(), learnable.state_dict())
    for name, value in observed.state_dict().items():
        assert value.dtype == learnable.state_dict()[name].dtype
    assert list(observed.parameters()) == []
    assert [name for name, _ in learnable.named_parameters()] == ["scale", "zero_point"]
    for layer in (observed, learnable):
        assert layer.scale.shape == layer.zero_point.shape == (channels,)
    learnable.load_state_dict(trained_layer(scheme, num_channels=channels).state_dict())
    assert learnable.is_initialized


@either_kind
def test_keys_and_shapes_never_change(learnable: bool) -> None:
    layer = FakeQuantizeLayer(PER_CHANNEL, learnable=learnable, num_channels=3)
    shapes = {name: value.shape for name, value in layer.state_dict().items()}
    places = {name: value.data_ptr() for name, value in layer.state_dict(keep_vars=True).items() if name != "grid"}
    layer(torch.randn(4, 3))
    layer(torch.randn(9, 3, 2))
    layer.reset()
    assert {name: value.shape for name, value in layer.state_dict().items()} == shapes
    after = {name: value.data_ptr() for name, value in layer.state_dict(keep_vars=True).items() if name != "grid"}
    assert after == places  # but of the grid, which never changes and is written for the state dict alone


def test_a_symmetric_zero_point_is_not_trained() -> None:
    assert not FakeQuantizeLayer(learnable=True).zero_point.requires_grad
    assert FakeQuantizeLayer(AFFINE, learnable=True).zero_point.requires_grad


@pytest.mark.parametrize("scheme", [QuantizationScheme(), AFFINE, PER_CHANNEL], ids=str)
@either_kind
def test_the_first_batch_sets_the_parameters(scheme: QuantizationScheme, learnable: bool) -> None:
    channels = 1 if scheme.channel_axis is None else 3
    layer = FakeQuantizeLayer(scheme, learnable=learnable, num_channels=channels)
    input = torch.randn(20, 3, 4)
    dimensions = (0, 2) if channels == 3 else (0, 1, 2)
    expected = QuantizationParameters.from_range(
        input.amin(dimensions).reshape(-1), input.amax(dimensions).reshape(-1), scheme
    )
    values = layer(input)
    assert torch.equal(layer.scale, expected.scale)
    assert torch.equal(layer.zero_point, expected.zero_point)
    assert torch.equal(values, fake_quantize(input, expected))


def test_observed_parameters_follow_the_observer() -> None:
    layer = FakeQuantizeLayer(observer=MinMaxObserver(update_every=2))
    scales = []
    for magnitude in (1.0, 2.0, 4.0, 8.0, 16.0):
        layer(torch.tensor([magnitude]))
        scales.append(layer.scale.item() * 127)
    # Batches 1, 3 and 5 are due. A quotient by 127 and back: two float32 roundings.
    assert scales == pytest.approx([1, 1, 4, 4, 16], rel=1e-6)


def test_learned_parameters_are_the_optimizers_after_the_first_batch() -> None:
    layer = trained_layer(learnable=True)
    before = snapshot_of(layer)
    layer(torch.randn(50) * 100)
    assert_same_state(snapshot_of(layer), before)


@pytest.mark.parametrize("scheme", [QuantizationScheme(bits=3), AFFINE], ids=str)
def test_an_optimizer_trains_scale_and_zero_point(scheme: QuantizationScheme) -> None:
    layer, input = FakeQuantizeLayer(scheme, learnable=True), torch.randn(1000) + 1
    layer(torch.tensor([-6.0, 6.0]))  # far too wide
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses, start = [], snapshot_of(layer)
    for _ in range(150):
        loss = (layer(input) - input).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert layer.scale.item() < start["scale"].item()
    assert bool(layer.zero_point != start["zero_point"]) == (not scheme.symmetric)


@either_kind
def test_evaluation_before_data(learnable: bool) -> None:
    layer = FakeQuantizeLayer(learnable=learnable).eval()
    layer.name = "features.3"
    input = torch.randn(3)
    with pytest.warns(UserWarning, match=r"features\.3 has seen no data"):
        assert torch.equal(layer(input), input)
    assert torch.equal(layer(input), input)  # one warning
    with pytest.raises(RuntimeError, match="has seen no data"):
        _ = layer.parameters_on_grid


@either_kind
def test_evaluation_observes_nothing(learnable: bool) -> None:
    layer = trained_layer(learnable=learnable).eval()
    before = snapshot_of(layer)
    input = torch.randn(10) * 100
    assert torch.equal(layer(input), expected_values(input, layer))
    assert_same_state(snapshot_of(layer), before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_refuses_what_is_not_floating_point_and_keeps_its_state(dtype: torch.dtype) -> None:
    layer = FakeQuantizeLayer()
    with pytest.raises(TypeError, match=f"input must be a floating-point tensor, got {dtype}"):
        layer(torch.ones(3, dtype=dtype))
    assert not layer.is_initialized


@pytest.mark.parametrize("shape", [(3,), (4, 2)])
def test_refuses_other_channels_and_keeps_its_state(shape: tuple[int, ...]) -> None:
    layer = FakeQuantizeLayer(PER_CHANNEL, num_channels=3)
    with pytest.raises(ValueError, match=r"3 channels along axis 1|channel_axis 1 is out of range"):
        layer(torch.ones(shape))
    assert not layer.is_initialized
    assert layer.observer.batches.item() == 0


def test_refuses_arguments_that_disagree() -> None:
    with pytest.raises(TypeError, match="scheme must be a QuantizationScheme, got int"):
        FakeQuantizeLayer(8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="observer must be an ActivationObserver, got type"):
        FakeQuantizeLayer(observer=MinMaxObserver)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layer must be a module or None, got"):
        FakeQuantizeLayer(layer=torch.relu)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="observer must watch the scheme's channel_axis 1, got None"):
        FakeQuantizeLayer(PER_CHANNEL, MinMaxObserver())
    with pytest.raises(ValueError, match="observer must have num_channels=3, got 2"):
        FakeQuantizeLayer(PER_CHANNEL, MinMaxObserver(channel_axis=1, num_channels=2), num_channels=3)


@either_kind
@pytest.mark.parametrize("make", [MinMaxObserver, MovingAverageObserver, PercentileObserver, HistogramObserver])
def test_a_loaded_layer_is_ready_and_computes_the_same(make: Any, learnable: bool) -> None:
    layer = trained_layer(observer=make(), learnable=learnable)
    fresh = FakeQuantizeLayer(AFFINE, make(), learnable).eval()
    fresh.load_state_dict(layer.state_dict())
    input = torch.randn(100)
    assert fresh.is_initialized
    assert torch.equal(fresh(input), layer.eval()(input))


def test_loading_a_fresh_state_makes_a_layer_fresh() -> None:
    layer = trained_layer()
    layer.load_state_dict(FakeQuantizeLayer(AFFINE).state_dict())
    assert not layer.is_initialized


OTHER_SCHEMES = [
    QuantizationScheme(bits=8, signed=False, symmetric=False),
    QuantizationScheme(bits=4, signed=True, symmetric=False),
    QuantizationScheme(bits=4, signed=False, symmetric=True),
    QuantizationScheme(bits=4, signed=False, symmetric=False, narrow_range=True),
    QuantizationScheme(bits=4, signed=False, symmetric=False, channel_axis=0),
]


@either_kind
@pytest.mark.parametrize("other", OTHER_SCHEMES, ids=str)
def test_the_state_of_another_scheme_is_refused(other: QuantizationScheme, learnable: bool) -> None:
    layer = trained_layer(learnable=learnable)
    before, state = snapshot_of(layer), FakeQuantizeLayer(other).state_dict()
    with pytest.raises(RuntimeError, match=r"quantized as .*, expected uint4"):
        layer.load_state_dict(state)
    assert_same_state(snapshot_of(layer), before)
    assert layer.is_initialized


def test_a_refused_state_is_named_by_its_place_in_the_model() -> None:
    model = nn.Sequential(nn.Identity(), FakeQuantizeLayer(AFFINE))
    state = nn.Sequential(nn.Identity(), FakeQuantizeLayer()).state_dict()
    with pytest.raises(RuntimeError, match="state_dict holds 1 quantized as int8"):
        model.load_state_dict(state)


@either_kind
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_are_independent(learnable: bool, how: str) -> None:
    layer = trained_layer(
        learnable=learnable, layer=nn.Linear(1, 2), estimator=StraightThroughEstimator(gradient_clip=1.0)
    )
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    input = torch.randn(20, 1)
    assert torch.equal(layer.eval()(input), twin.eval()(input))
    assert twin.estimator == layer.estimator
    before = snapshot_of(layer)
    with torch.no_grad():
        twin.scale.mul_(2)
    assert_same_state(snapshot_of(layer), before)


@either_kind
def test_the_state_loads_as_plain_tensors(learnable: bool) -> None:
    layer = trained_layer(learnable=learnable)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = FakeQuantizeLayer(AFFINE, learnable=learnable)
    fresh.load_state_dict(state)
    assert_same_state(fresh.state_dict(), layer.state_dict())


@either_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_reaches_the_wrapped_layer_and_spares_the_state(dtype: torch.dtype, learnable: bool) -> None:
    layer = trained_layer(learnable=learnable, layer=nn.Linear(1, 3))
    before = {name: value for name, value in snapshot_of(layer).items() if not name.startswith("layer.")}
    model = nn.Sequential(layer).to(dtype)
    assert isinstance(layer.layer, nn.Linear)
    assert layer.layer.weight.dtype is dtype
    assert_same_state({name: layer.state_dict()[name] for name in before}, before)
    assert all(value.dtype is not dtype for name, value in layer.state_dict().items() if not name.startswith("layer."))
    input = torch.randn(5, 1, dtype=dtype)
    values = model(input)
    assert values.dtype is dtype
    assert isinstance(layer.zero_point, nn.Parameter) == learnable
    back = model.float()(input.float())
    assert back.dtype is torch.float32


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_scales_stay_float32(cast: str) -> None:
    layer = trained_layer()
    getattr(layer, cast)()
    assert layer.scale.dtype is layer.zero_point.dtype is torch.float32
    assert all(buffer.dtype is not torch.float16 for buffer in layer.buffers())


def test_wraps_a_module_and_quantizes_its_output() -> None:
    inner = nn.Linear(4, 3)
    layer = FakeQuantizeLayer(PER_CHANNEL, layer=inner, num_channels=3)
    input = torch.randn(10, 4)
    output = inner(input).detach()
    values = layer(input)
    assert torch.equal(values, expected_values(output, layer))
    expected = QuantizationParameters.from_range(output.amin(0), output.amax(0), PER_CHANNEL)
    assert torch.equal(layer.scale, expected.scale)
    values.sum().backward()
    assert inner.weight.grad is not None
    assert [name for name, _ in layer.named_parameters()] == ["layer.weight", "layer.bias"]


def test_passes_further_arguments_to_the_wrapped_module() -> None:
    class Affine(nn.Module):
        def forward(self, input: Tensor, factor: float, *, offset: float) -> Tensor:
            return input * factor + offset

    layer = FakeQuantizeLayer(layer=Affine())
    assert layer(torch.tensor([1.0]), 2.0, offset=125.0).item() == pytest.approx(127, rel=1e-6)  # float32 rounding


def test_refuses_a_wrapped_module_whose_output_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="got tuple"):
        FakeQuantizeLayer(layer=nn.LSTM(2, 2))(torch.randn(1, 1, 2))


@pytest.mark.parametrize("axis", [1, -2])
def test_channels_of_a_channels_last_image_on_any_axis(axis: int) -> None:
    scheme = QuantizationScheme(symmetric=False, channel_axis=1 if axis == 1 else -3)
    layer = FakeQuantizeLayer(scheme, num_channels=5)
    image = torch.randn(2, 5, 4, 3).to(memory_format=torch.channels_last)
    values = layer(image)
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(values, expected_values(image, layer))
    for channel in range(5):
        alone = FakeQuantizeLayer(QuantizationScheme(symmetric=False))
        assert torch.equal(values[:, channel], alone(image[:, channel]))


@either_kind
def test_reset_makes_the_next_batch_the_first(learnable: bool) -> None:
    layer = trained_layer(learnable=learnable)
    layer.reset()
    assert not layer.is_initialized
    input = torch.randn(3)
    with pytest.warns(UserWarning, match="has seen no data"):
        assert torch.equal(layer.eval()(input), input)
    layer.train()
    batch = torch.randn(30) * 7
    layer(batch)
    fresh = FakeQuantizeLayer(AFFINE)
    fresh(batch)
    assert torch.equal(layer.scale, fresh.scale)
    assert torch.equal(layer.zero_point, fresh.zero_point)


@either_kind
def test_set_parameters_makes_it_ready(learnable: bool) -> None:
    layer = FakeQuantizeLayer(AFFINE, learnable=learnable).eval()
    parameters = QuantizationParameters(torch.tensor([0.25]), torch.tensor([3]), AFFINE)
    place = layer.scale.data_ptr()
    layer.set_parameters(parameters)
    input = torch.randn(20)
    assert torch.equal(layer(input), fake_quantize(input, parameters))
    assert layer.scale.data_ptr() == place


@pytest.mark.parametrize(
    "parameters",
    [
        QuantizationParameters(torch.ones(1), torch.zeros(1), QuantizationScheme()),
        QuantizationParameters(torch.ones(2), torch.zeros(2), PER_CHANNEL),
    ],
    ids=["scheme", "channels"],
)
def test_set_parameters_refuses_what_does_not_fit(parameters: QuantizationParameters) -> None:
    layer = FakeQuantizeLayer(PER_CHANNEL, num_channels=3)
    with pytest.raises(ValueError, match=r"parameters must be of scheme .* and shape"):
        layer.set_parameters(parameters)
    assert not layer.is_initialized


def test_parameters_on_grid_round_a_learned_zero_point_and_are_detached() -> None:
    layer = trained_layer(learnable=True)
    with torch.no_grad():
        layer.zero_point.fill_(6.7)
    parameters = layer.parameters_on_grid
    assert parameters.zero_point.item() == 7
    assert not parameters.scale.requires_grad
    input = torch.randn(50)
    assert torch.equal(layer(input), fake_quantize(input, parameters))


def test_switched_off_values_pass_as_they_are() -> None:
    layer = FakeQuantizeLayer()
    layer.fake_quantize_enabled = False
    input = torch.randn(5)
    assert layer(input) is input
    assert layer.is_initialized  # it still observes
    layer.observer.enabled = False
    before = snapshot_of(layer)
    layer(input * 100)
    assert_same_state(snapshot_of(layer), before)


def test_observer_switched_off_from_the_start() -> None:
    layer = FakeQuantizeLayer()
    layer.observer.enabled = False
    with pytest.raises(RuntimeError, match="has seen no data"):
        layer(torch.randn(3))


@either_kind
def test_two_forwards_before_one_backward(learnable: bool) -> None:
    layer = trained_layer(observer=MovingAverageObserver(momentum=0.5), learnable=learnable)
    inputs = [torch.randn(20, requires_grad=True), (torch.randn(20) * 5).requires_grad_()]
    total, masks = torch.zeros(()), []
    for input in inputs:
        total = total + layer(input).sum()
        # The range that this forward used, whatever later ones make of it.
        ends = (torch.tensor([0.0, 15.0]) - layer.zero_point.detach()) * layer.scale.detach()
        masks.append((input >= ends[0] - layer.scale / 2) & (input <= ends[1] + layer.scale / 2))
    total.backward()
    for input, mask in zip(inputs, masks, strict=True):
        assert input.grad is not None
        assert torch.equal(input.grad, mask.float())


@either_kind
@pytest.mark.parametrize("make", [MinMaxObserver, MovingAverageObserver, PercentileObserver, HistogramObserver])
def test_a_training_forward_reads_nothing_back(monkeypatch: pytest.MonkeyPatch, make: Any, learnable: bool) -> None:
    """Reading a value would make a GPU wait; every way to do it from Python raises here."""
    layer = FakeQuantizeLayer(AFFINE, make(update_every=2), learnable)
    inputs = [torch.randn(30, requires_grad=True) for _ in range(3)]

    def refuse(self: Tensor, *args: Any) -> Any:
        raise AssertionError("a value was read back to the host")

    with monkeypatch.context() as patch:
        for name in ("item", "__bool__", "tolist", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero"):
            patch.setattr(Tensor, name, refuse)
        for input in inputs:
            layer(input).sum().backward()
    assert layer.is_initialized


@pytest.mark.parametrize("size", [0, 1])
def test_small_batches_are_legal(size: int) -> None:
    layer = trained_layer()
    assert layer(torch.randn(size, 4)).shape == (size, 4)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e30, 1e-30])
@pytest.mark.parametrize("scheme", [QuantizationScheme(), AFFINE], ids=str)
def test_a_constant_batch_gives_a_legal_grid(value: float, scheme: QuantizationScheme) -> None:
    layer = FakeQuantizeLayer(scheme)
    values = layer(torch.full((4,), value))
    assert layer.parameters_on_grid.scale.item() > 0
    assert bool(values.isfinite().all())


def test_repr_says_what_it_is() -> None:
    layer = FakeQuantizeLayer(AFFINE, learnable=True)
    layer.fake_quantize_enabled = False
    assert "uint4 [0, 15] affine, per tensor, learnable, disabled" in repr(layer)


@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("scheme", [AFFINE, PER_CHANNEL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_update_is_that_of_the_formulas(
    scheme: QuantizationScheme, update_every: int, dtype: torch.dtype
) -> None:
    channels = 1 if scheme.channel_axis is None else 5
    layers = [
        FakeQuantizeLayer(
            scheme,
            MovingAverageObserver(
                0.3, channel_axis=scheme.channel_axis, num_channels=channels, update_every=update_every
            ),
            num_channels=channels,
        )
        for _ in range(2)
    ]
    for step in range(10):
        batch = torch.randn(8, 5, dtype=dtype) * (step + 1)
        if step == 4:
            batch[0, 2] = torch.nan
        values = layers[0](batch)
        with kernels.reference_kernels():
            expected = layers[1](batch)
        assert torch.equal(values.nan_to_num(7.0), expected.nan_to_num(7.0))
        states = [layer.state_dict() for layer in layers]
        for name in states[0]:
            assert torch.equal(states[0][name], states[1][name]), name
    assert layers[0].is_initialized


def test_an_update_counts_as_a_change_of_the_state() -> None:
    layer = trained_layer()
    versions = layer.scale._version, layer.zero_point._version
    layer(torch.randn(50, 1))
    assert layer.scale._version > versions[0]
    assert layer.zero_point._version > versions[1]
