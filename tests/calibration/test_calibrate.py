"""Calibration sees the float model, starts afresh, and leaves no trace where it fails."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from combinations import half_of_all
from example_architectures import BranchNeverTaken, SmallResNet
from example_models import EVERY_EXAMPLE, EXAMPLES, Example, all_equal, results, train_briefly
from mlframework.quantization import (
    FakeQuantizeLayer,
    MinMaxObserver,
    QATConfig,
    calibrate,
    convert,
    prepare,
)

IMAGES = torch.randn(4, 3, 8, 8)
LINE = torch.randn(16, 5)


def prepared_resnet(**fields: Any) -> nn.Module:
    return prepare(SmallResNet(), QATConfig(**fields), (IMAGES,))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@EVERY_EXAMPLE
def test_the_forward_is_the_float_models_bit_for_bit(example: Example) -> None:
    model = example.make().eval()
    prepared = prepare(model, QATConfig(activation_observer=MinMaxObserver), example.inputs())
    seen: list[list[Tensor]] = []
    prepared.register_forward_hook(lambda module, args, output: seen.append(tree_leaves(output)))
    batches = [example.inputs(), example.inputs(1), example.inputs(6)]
    calibrate(prepared, copy.deepcopy(batches))
    with torch.no_grad():
        assert all(all_equal(results(model, *batch), output) for batch, output in zip(batches, seen, strict=True))


@pytest.mark.parametrize(
    "batches",
    [[LINE, LINE + 1], [(LINE,), (LINE + 1,)], [[LINE], [LINE + 1]], [{"x": LINE}, {"x": LINE + 1}]],
    ids=["tensors", "tuples", "lists", "mappings"],
)
def test_batches_come_in_any_form(batches: list[Any]) -> None:
    prepared = prepare(EXAMPLES["unused"].make(), QATConfig(activation_observer=MinMaxObserver), (LINE,))
    calibrate(prepared, iter(batches))
    span = (LINE + 1).max() - LINE.min()
    # The grid halves both ends before subtracting them, which may change the last bit.
    torch.testing.assert_close(prepared.x_fake_quantize.scale, span.reshape(1) / 255, rtol=1e-6, atol=0)


def test_earlier_statistics_are_forgotten() -> None:
    once, twice = prepared_resnet(), prepared_resnet()
    twice.load_state_dict(once.state_dict())
    for factor in (100.0, 1000.0):
        calibrate(twice, [IMAGES * factor])
    calibrate(once, [IMAGES])
    calibrate(twice, [IMAGES])
    assert_state(once, state_of(twice))


def test_after_training_only_statistics_and_scales_change() -> None:
    prepared = prepared_resnet()
    train_briefly(prepared, (IMAGES,))
    before = state_of(prepared)
    calibrate(prepared, [IMAGES * 3])
    changed = {name for name, value in prepared.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("fake_quantize" in name for name in changed)


def test_learned_scales_are_set() -> None:
    prepared = prepared_resnet(learnable=True)
    calibrate(prepared, [IMAGES])
    observed = prepared_resnet()
    observed.load_state_dict(prepared.state_dict(), strict=False)
    calibrate(observed, [IMAGES])
    scale = prepared.stem.output_fake_quantize.scale
    assert isinstance(scale, nn.Parameter)
    assert torch.equal(scale, observed.stem.output_fake_quantize.scale)


def test_modes_and_switches_are_restored() -> None:
    prepared = prepared_resnet()
    prepared.train()
    prepared.bn.eval()
    modes = [module.training for module in prepared.modules()]
    calibrate(prepared, [IMAGES])
    assert [module.training for module in prepared.modules()] == modes
    assert not any(module.calibrating for module in prepared.modules() if isinstance(module, FakeQuantizeLayer))


def test_no_graph_is_recorded() -> None:
    prepared, outputs = prepared_resnet(), []
    prepared.register_forward_hook(lambda module, args, output: outputs.append(output.requires_grad))
    calibrate(prepared, [IMAGES])
    assert outputs == [False]


class Stop(BaseException):
    pass


def broken(error: BaseException) -> Iterator[Tensor]:
    yield IMAGES * 50
    raise error


@half_of_all(
    error={type(error).__name__: error for error in (RuntimeError("disk"), KeyboardInterrupt(), Stop())},
    before={before: before for before in ("nothing", "calibration", "training")},
    learnable={"observed": False, "learnable": True},
)
def test_an_interruption_leaves_everything_as_it_was(error: BaseException, before: str, learnable: bool) -> None:
    prepared = prepared_resnet(learnable=learnable)
    if before == "calibration":
        calibrate(prepared, [IMAGES])
    if before == "training":
        train_briefly(prepared, (IMAGES,))
    state = state_of(prepared)
    ready = [module.is_initialized for module in prepared.modules() if isinstance(module, FakeQuantizeLayer)]
    with pytest.raises(type(error)):
        calibrate(prepared, broken(error))
    assert_state(prepared, state)
    assert prepared.training
    now = [module.is_initialized for module in prepared.modules() if isinstance(module, FakeQuantizeLayer)]
    assert now == ready
    assert not any(module.calibrating for module in prepared.modules() if isinstance(module, FakeQuantizeLayer))


def test_a_batch_that_fails_halfway_leaves_nothing_pending() -> None:
    prepared, other = prepared_resnet(), prepared_resnet()
    other.load_state_dict(prepared.state_dict())
    with pytest.raises(RuntimeError):
        calibrate(prepared, [IMAGES, IMAGES[:, :, :1, :1]])  # no pixel is left after the pooling
    for model in (prepared, other):
        calibrate(model, [IMAGES])
    assert_state(prepared, state_of(other))


def test_no_batches_are_refused() -> None:
    prepared = prepared_resnet()
    calibrate(prepared, [IMAGES])
    state = state_of(prepared)
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(prepared, [])
    assert_state(prepared, state)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be a prepared model"):
        calibrate(SmallResNet(), [IMAGES])


@pytest.mark.parametrize(
    "odd",
    [torch.empty(0, 5), torch.full((4, 5), torch.nan), torch.full((4, 5), torch.inf)],
    ids=["empty", "nan", "infinite"],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_batches_without_finite_values_count_for_nothing(odd: Tensor, first: bool) -> None:
    prepared = prepare(EXAMPLES["unused"].make(), QATConfig(), (LINE,))
    other = copy.deepcopy(prepared)
    calibrate(prepared, [odd, LINE] if first else [LINE, odd])
    calibrate(other, [LINE])
    scales = [name for name in prepared.state_dict() if name.endswith(("scale", "zero_point"))]
    assert all(torch.equal(prepared.state_dict()[name], other.state_dict()[name]) for name in scales)


def test_a_branch_not_taken_keeps_its_nodes_without_data() -> None:
    prepared = prepare(BranchNeverTaken(), QATConfig(), (LINE,))
    calibrate(prepared, [LINE])
    assert prepared.usual.input_fake_quantize.is_initialized
    assert not prepared.rare.input_fake_quantize.is_initialized


@pytest.mark.parametrize("batch", [(IMAGES, torch.zeros(4)), {"image": IMAGES}, ()], ids=["labels", "name", "nothing"])
def test_a_batch_that_does_not_fit_is_refused(batch: Any) -> None:
    prepared = prepared_resnet()
    train_briefly(prepared, (IMAGES,))
    state = state_of(prepared)
    with pytest.raises(TypeError, match=r"batches must hold a tensor, .* drop the labels") as caught:
        calibrate(prepared, [IMAGES * 3, batch])
    assert isinstance(caught.value.__cause__, TypeError)
    assert_state(prepared, state)


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), lambda: nn.LayerNorm(5)])
def test_a_prepared_model_without_anything_to_quantize_is_called_that(make: Any) -> None:
    prepared = prepare(make(), QATConfig(), (LINE,))
    with pytest.raises(ValueError, match=r"nothing to calibrate: prepare\(\) found no layer to quantize"):
        calibrate(prepared, [LINE])
    with pytest.raises(ValueError, match=r"nothing to convert: prepare\(\) found no layer to quantize"):
        convert(prepared)
