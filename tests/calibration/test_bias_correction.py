"""After a bias correction the mean of every layer's output is the float model's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from example_architectures import SmallResNet
from example_models import OTHERS_LONG, Example
from mlframework.quantization import QATConfig, calibrate, convert, correct_bias, prepare


def chain() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 5),
    )


def means(model: nn.Module, batch: Tensor, names: list[str]) -> list[Tensor]:
    """Of the float64 outputs of these layers, by channel."""
    found: list[Tensor] = []
    modules = dict(model.named_modules())
    for name in names:
        layer = getattr(modules[name], "layer", modules[name])
        layer.register_forward_hook(
            lambda module, args, output: found.append(output.double().transpose(0, 1).flatten(1).mean(1))
        )
    with torch.no_grad():
        model(batch)
    return found


def test_means_are_the_float_models() -> None:
    batch = torch.randn(32, 3, 8, 8) + 0.3
    model = chain().eval()
    prepared = prepare(model, QATConfig(weight_bits=3), (batch,))
    calibrate(prepared, [batch])
    plain = copy.deepcopy(prepared).eval()
    report = correct_bias(prepared, [batch])
    assert report.changed == ["0", "2", "5"]
    names = ["0", "2", "5"]
    expected = means(model, batch, names)
    before = means(plain, batch, names)
    after = means(prepared.eval(), batch, names)
    for one, was, now in zip(expected, before, after, strict=True):
        # The bias is rounded to units of the accumulator; codes of the input are as before, or a step beside.
        assert float((now - one).abs().max()) < 0.03 * float((was - one).abs().max())


def test_the_float_model_and_the_weights_stay() -> None:
    batch = torch.randn(8, 3, 8, 8)
    model = chain()
    state = copy.deepcopy(model.state_dict())
    prepared = prepare(model, QATConfig(weight_bits=4), (batch,))
    calibrate(prepared, [batch], method="correct_bias")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    changed = {name for name, value in prepared.state_dict().items() if name in state and (value != state[name]).any()}
    assert changed == {"0.bias", "2.bias", "5.bias"}
    assert dict(prepared.named_parameters())["0.weight"] is model[0].weight
    assert prepared.state_dict().keys() >= state.keys()


def test_with_batch_norm_it_is_the_running_mean_that_moves() -> None:
    batches = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    prepared = prepare(SmallResNet(), QATConfig(weight_bits=4), (batches[0],))
    calibrate(prepared, batches)
    before = copy.deepcopy(prepared.state_dict())
    correct_bias(prepared, batches)
    changed = {name for name, value in prepared.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "bias"}


@pytest.mark.filterwarnings("ignore:no data reached:UserWarning")
@OTHERS_LONG
def test_any_model_is_corrected_and_converts(example: Example) -> None:
    batches = [example.inputs(), example.inputs(3)]
    prepared = prepare(example.make(), QATConfig(weight_bits=4), batches[0])
    calibrate(prepared, batches, method="correct_bias")
    prepared.eval()
    with torch.no_grad():
        expected = prepared(*batches[0])
        actual = convert(prepared)(*batches[0])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_an_error_leaves_the_parameters() -> None:
    batch = torch.randn(8, 3, 8, 8)
    prepared = prepare(chain(), QATConfig(weight_bits=4), (batch,))
    calibrate(prepared, [batch])
    parameters, state = list(prepared.parameters()), copy.deepcopy(prepared.state_dict())
    with pytest.raises(RuntimeError):
        correct_bias(prepared, [batch, batch[:, :, :2, :2]])
    assert all(one is other for one, other in zip(parameters, prepared.parameters(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in prepared.state_dict().items())


def test_an_unknown_method_is_refused() -> None:
    prepared = prepare(chain(), QATConfig(), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(ValueError, match=r"method must be among .*, got 'magic'"):
        calibrate(prepared, [torch.randn(2, 3, 8, 8)], method=("correct_bias", "magic"))


def test_beside_rounding_it_is_refused_or_leaves_the_layers_out() -> None:
    batch = torch.randn(32, 3, 8, 8)
    prepared = prepare(chain(), QATConfig(weight_bits=4), (batch,))
    for methods in (("correct_bias", "round_weights"), ("round_weights", "correct_bias")):
        with pytest.raises(ValueError, match="must not have correct_bias beside round_weights"):
            calibrate(prepared, [batch], method=methods)
    calibrate(prepared, [batch], method="round_weights")
    state = copy.deepcopy(prepared.state_dict())
    report = correct_bias(prepared, [batch])
    assert report.changed == []
    assert set(report.left_out.values()) == {"its weight is rounded"}
    assert all(torch.equal(value, state[name]) for name, value in prepared.state_dict().items())
