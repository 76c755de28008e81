"""Rounded weights: nearer to the float model, and the very codes that were chosen wherever the model goes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from example_architectures import SmallResNet
from example_models import OTHERS_LONG, Example, all_equal, results, train_briefly
from mlframework.quantization import MinMaxObserver, QATConfig, calibrate, convert, prepare, round_weights
from mlframework.quantization.calibration.layers import quantized_layers
from mlframework.quantization.calibration.rounding import _rows_for

IMAGES = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=12),
        nn.ReLU6(),
        nn.Conv2d(12, 8, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 10),
    ).eval()


def prepared_network(model: nn.Module | None = None, **fields: Any) -> nn.Module:
    config = QATConfig(**{"weight_bits": 4, "activation_observer": MinMaxObserver, **fields})
    prepared = prepare(network() if model is None else model, config, (IMAGES[0],))
    calibrate(prepared, IMAGES)
    return prepared


def noise(model: nn.Module, reference: nn.Module) -> float:
    with torch.no_grad():
        expected = reference(IMAGES[1])
        return float((model.eval()(IMAGES[1]) - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
def test_outputs_are_nearer_to_the_float_models(bits: int, per_channel: bool) -> None:
    model = network()
    prepared = prepared_network(model, weight_bits=bits, per_channel_weights=per_channel)
    before = noise(prepared, model)
    state = copy.deepcopy(model.state_dict())
    report = round_weights(prepared, IMAGES)
    assert report.changed == ["0", "3", "5", "8"]
    assert noise(prepared, model) < (0.5 if bits < 8 else 1) * before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: wrapper.weight_fake_quantize.to_codes(wrapper.evaluated_weight())
        for name, wrapper in model.named_modules()
        if hasattr(wrapper, "weight_fake_quantize")
    }


def test_biases_keep_the_mean_output_over_batches_of_several_sizes() -> None:
    """Each batch counts as much as another, as in bias correction."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1))
    batches = [torch.randn(count, 3, size, size) + count / 4 for count, size in ((4, 8), (2, 13), (6, 8))]
    prepared = prepare(model, QATConfig(weight_bits=2), (batches[0],))
    calibrate(prepared, batches)
    round_weights(prepared, batches)
    (layer,) = quantized_layers(prepared, batches[0])

    def mean_output(conv: Any, quantize: Any) -> Tensor:
        outputs = [F.conv2d(quantize(batch), conv.weight, conv.bias, 2, 1) for batch in batches]
        return torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)

    with torch.no_grad():
        input_node = layer.wrapper.input_source
        torch.testing.assert_close(mean_output(layer.layer, input_node), mean_output(model[0], nn.Identity()))


@pytest.mark.parametrize("learnable", [False, True], ids=["observed", "learnable"])
def test_codes_are_the_chosen_ones_wherever_the_model_goes(learnable: bool) -> None:
    prepared = prepared_network(learnable=learnable)
    round_weights(prepared, IMAGES)
    prepared.eval()
    codes = codes_of(prepared)
    for name, wrapper in prepared.named_modules():
        if name in codes:
            values = wrapper.weight_fake_quantize.to_values(codes[name])
            assert torch.equal(values, wrapper.weight.detach())
    with torch.no_grad():
        expected = prepared(IMAGES[0])
        assert torch.equal(convert(prepared)(IMAGES[0]), expected)
        copied = copy.deepcopy(prepared)
        file = io.BytesIO()
        torch.save(prepared.state_dict(), file)
        file.seek(0)
        loaded = prepared_network(learnable=learnable).eval()
        loaded.load_state_dict(torch.load(file))
        for other in (copied, loaded):
            assert torch.equal(other(IMAGES[0]), expected)
            assert all(torch.equal(value, codes[name]) for name, value in codes_of(other).items())
            assert torch.equal(convert(other)(IMAGES[0]), expected)
    prepared.train()
    prepared(IMAGES[0])
    assert all(torch.equal(value, codes[name]) for name, value in codes_of(prepared).items())


def test_it_is_deterministic_and_leaves_random_state_and_modes() -> None:
    ones, others = prepared_network(), prepared_network()
    ones.train()
    random = torch.get_rng_state()
    for model in (ones, others):
        round_weights(model, IMAGES)
    assert torch.equal(torch.get_rng_state(), random)
    assert ones.training
    assert all(torch.equal(value, others.state_dict()[name]) for name, value in ones.state_dict().items())


@pytest.mark.filterwarnings("ignore:no data reached:UserWarning")
@OTHERS_LONG
def test_any_model_is_rounded_and_converts(example: Example) -> None:
    batches = [example.inputs(), example.inputs(3)]
    prepared = prepare(example.make(), QATConfig(weight_bits=4), batches[0])
    calibrate(prepared, batches, method="round_weights")
    prepared.eval()
    with torch.no_grad():
        expected = results(prepared, *batches[0])
        assert all(bool(torch.isfinite(tensor).all()) for tensor in expected)
        assert all_equal(results(convert(prepared), *batches[0]), expected)


def test_training_goes_on() -> None:
    prepared = prepared_network()
    round_weights(prepared, IMAGES)
    before = copy.deepcopy(prepared.state_dict())
    train_briefly(prepared, (IMAGES[0],))
    assert not torch.equal(prepared.state_dict()["0.weight"], before["0.weight"])
    assert torch.equal(prepared.state_dict()["0.weight_fake_quantize.scale"], before["0.weight_fake_quantize.scale"])


def test_weights_of_inputs_that_calibration_never_sees_are_not_clipped() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1)).eval()
    with torch.no_grad():
        model[0].weight[:, 0] *= 5  # the largest weights, of an input that is zero in calibration
    batch = torch.rand(8, 4, 8, 8)
    batch[:, 0] = 0
    prepared = prepare(model, QATConfig(), (batch,))
    calibrate(prepared, [batch])
    scale = prepared[0].weight_fake_quantize.scale.clone()
    round_weights(prepared, [batch])
    assert torch.equal(prepared[0].weight_fake_quantize.scale, scale)
    error = (prepared[0].weight - model[0].weight).detach()[:, 0].abs().flatten()
    assert (error <= 0.5001 * scale).all()  # nothing to make up for; float32 quotients round


@pytest.mark.parametrize(
    ("layer", "shape", "rows"),
    [
        (nn.Linear(8, 4), (8,), 16384),
        (nn.Linear(800, 4), (800,), 24 * 800),
        (nn.Linear(1152, 4), (1152,), 2**24 // 1152),
        (nn.Conv2d(640, 640, 5, groups=640), (640, 6, 6), 4096),
    ],
    ids=["few inputs", "many", "very many", "depthwise"],
)
def test_statistics_have_rows_for_all_unknowns_and_bounded_memory(
    layer: nn.Module, shape: tuple[int, ...], rows: int
) -> None:
    batch = torch.randn(2, *shape)
    prepared = prepare(nn.Sequential(layer), QATConfig(), (batch,))
    calibrate(prepared, [batch])
    assert [_rows_for(layer) for layer in quantized_layers(prepared, batch)] == [rows]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("learnable", [False, True], ids=["observed", "learnable"])
def test_an_interruption_leaves_everything_as_it_was(learnable: bool) -> None:
    prepared = prepared_network(SmallResNet(), learnable=learnable)
    parameters, state = list(prepared.parameters()), copy.deepcopy(prepared.state_dict())
    calls = []

    def stop(module: nn.Module, args: object) -> None:
        calls.append(module)
        if len(calls) > 8:
            raise Stop

    prepared.block.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        round_weights(prepared, IMAGES)
    assert all(one is other for one, other in zip(parameters, prepared.parameters(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in prepared.state_dict().items())
    assert prepared.stem.weight_fake_quantize.observer.enabled


def test_what_cannot_be_rounded_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    prepared = prepare(model, QATConfig(), (IMAGES[0],))
    calibrate(prepared, IMAGES)
    report = round_weights(prepared, IMAGES)
    assert report.left_out == {"0": "its weight is computed", "2": "a transposed convolution is rounded to the nearest"}
