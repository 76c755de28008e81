"""The converted model gives, bit for bit, what the prepared one gives in evaluation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from example_architectures import BranchNeverTaken, Functional, SmallResNet, small_cnn
from example_engines import ENGINES
from example_models import (
    EVERY_EXAMPLE,
    EXAMPLES,
    IMAGE,
    SIGNAL,
    SOME_EXAMPLES,
    Example,
    all_equal,
    make_batch_norms_awkward,
    results,
    train_briefly,
)
from mlframework.quantization import (
    FakeQuantizeLayer,
    HistogramObserver,
    QATConfig,
    QATModuleWrapper,
    calibrate,
    convert,
    prepare,
)
from mlframework.quantization.int8.layers import Int8Linear

# One of the examples has a layer that its forward never reaches, of which convert() warns.
pytestmark = pytest.mark.filterwarnings("ignore:no data reached spare")

EVERY_CONFIG = [
    pytest.param(
        QATConfig(target=target, weight_bits=bits, activation_bits=bits, learnable=learnable),
        id=f"{target}-{bits}-{'learnable' if learnable else 'observed'}",
    )
    for target, bits, learnable in itertools.product(ENGINES, (8, 4), (False, True))
]


def trained(example: Example, config: QATConfig) -> nn.Module:
    prepared = prepare(example.make(), config, example.inputs())
    train_briefly(prepared, example.inputs(8))
    make_batch_norms_awkward(prepared)
    return prepared.eval()


def assert_same_results(prepared: nn.Module, converted: nn.Module, example: Example) -> None:
    batches = [example.inputs(), example.inputs(1), example.inputs(7)]
    if example.shape in (IMAGE, SIGNAL):
        batches.append(example.inputs(3, odd=True))
    if example.shape == IMAGE:
        batches.append((example.inputs(5)[0].to(memory_format=torch.channels_last),))
        batches.append((torch.randn(5, example.shape[0], *reversed(example.shape[1:])).transpose(2, 3) * 3,))
    with torch.no_grad():
        for batch in batches:
            assert all_equal(results(prepared, *batch), results(converted, *batch))


@EVERY_EXAMPLE
def test_converted_equals_prepared(example: Example) -> None:
    prepared = trained(example, QATConfig())
    assert_same_results(prepared, convert(prepared), example)


@pytest.mark.parametrize("config", EVERY_CONFIG[::3])  # each target, width and way of learning; all of them below
def test_converted_equals_prepared_for_many_configurations(config: QATConfig) -> None:
    prepared = trained(EXAMPLES["resnet"], config)
    assert_same_results(prepared, convert(prepared), EXAMPLES["resnet"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "config"),
    [
        pytest.param(
            example,
            *config.values,
            id=f"{name}-{config.id}",
            # Each example with one configuration of the sixteen, of which the next example has the next.
            marks=[] if (index + place) % len(EVERY_CONFIG) == 0 else pytest.mark.long,
        )
        for index, (name, example) in enumerate(EXAMPLES.items())
        for place, config in enumerate(EVERY_CONFIG)
    ],
)
def test_converted_equals_prepared_in_every_combination(example: Example, config: QATConfig) -> None:
    prepared = trained(example, config)
    assert_same_results(prepared, convert(prepared), example)


@pytest.mark.parametrize(
    "config",
    [
        QATConfig(per_channel_weights=False),
        QATConfig(weight_bits=2, activation_bits=3),
        QATConfig(quantize_last_linear=True),
        QATConfig(activation_observer=HistogramObserver),
        QATConfig(overrides={"block.*": QATConfig(weight_bits=4)}),
        QATConfig(skip=("stem", "block.conv2")),
        QATConfig(skip=(nn.Linear,)),
    ],
    ids=["per tensor", "2 and 3 bits", "last linear", "histogram", "override", "skip names", "skip type"],
)
def test_converted_equals_prepared_with_other_options(config: QATConfig) -> None:
    prepared = trained(EXAMPLES["resnet"], config)
    assert_same_results(prepared, convert(prepared), EXAMPLES["resnet"])


@SOME_EXAMPLES
def test_converted_equals_prepared_after_calibration_alone(example: Example) -> None:
    prepared = prepare(example.make(), QATConfig.for_target("executorch"), example.inputs())
    calibrate(prepared, [example.inputs(), example.inputs()])
    assert_same_results(prepared.eval(), convert(prepared), example)


def test_inputs_beyond_the_observed_range_saturate_alike() -> None:
    prepared = trained(EXAMPLES["functional"], QATConfig())
    converted = convert(prepared)
    inputs = torch.randn(4, 3, 8, 8) * 1e6
    with torch.no_grad():
        assert torch.equal(prepared(inputs), converted(inputs))


def test_empty_batches_pass() -> None:
    prepared = trained(EXAMPLES["functional"], QATConfig())
    inputs = torch.randn(0, 3, 8, 8)
    with torch.no_grad():
        assert convert(prepared)(inputs).shape == prepared(inputs).shape == (0, 3)


def test_keyword_arguments_are_taken_as_before() -> None:
    model = EXAMPLES["many results"].make()
    x, offset = torch.randn(4, 5), torch.rand(4, 6)
    prepared = prepare(model, QATConfig(), (x,), {"offset": offset, "factor": 2.0})
    prepared(x, offset, factor=2.0)
    prepared.eval()
    converted = convert(prepared)
    with torch.no_grad():
        ones = results(prepared, x, offset=offset, factor=3.0)
        assert all_equal(ones, results(converted, x=x, offset=offset, factor=3.0))
        assert not all_equal(ones, results(converted, x, offset, factor=1.0))


@SOME_EXAMPLES
def test_converting_leaves_the_prepared_model_as_it_was(example: Example) -> None:
    prepared = trained(example, QATConfig())
    prepared.train()
    modules = [(name, type(module), module.training) for name, module in prepared.named_modules()]
    state = copy.deepcopy(prepared.state_dict())
    converted = convert(prepared)
    assert [(name, type(module), module.training) for name, module in prepared.named_modules()] == modules
    assert all(torch.equal(value, state[name]) for name, value in prepared.state_dict().items())
    assert not converted.training
    mine = {tensor.data_ptr() for tensor in (*prepared.parameters(), *prepared.buffers())}
    theirs = [tensor for tensor in (*converted.parameters(), *converted.buffers()) if tensor.numel()]
    assert mine.isdisjoint(tensor.data_ptr() for tensor in theirs)


def test_class_and_hooks_of_the_user_stay() -> None:
    model = SmallResNet()
    calls: list[str] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(type(module).__name__)

    model.register_forward_hook(record)
    prepared = prepare(model, QATConfig(), (torch.randn(2, 3, 8, 8),))
    prepared(torch.randn(2, 3, 8, 8))
    converted = convert(prepared)
    calls.clear()
    converted(torch.randn(2, 3, 8, 8))
    assert calls == ["SmallResNet"]
    assert isinstance(converted, SmallResNet)
    assert converted.features()[:2] == ["stem", "bn"]
    assert not any(isinstance(module, FakeQuantizeLayer) for module in converted.modules())


@pytest.mark.parametrize("model", [small_cnn(), nn.Linear(3, 2)], ids=["model", "layer"])
def test_a_float_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="prepared"):
        convert(model)


@pytest.mark.parametrize("example", [EXAMPLES["cnn"], EXAMPLES["branches at root"]], ids=["traced", "not traced"])
def test_a_model_that_saw_no_data_is_refused(example: Example) -> None:
    prepared = prepare(example.make(), QATConfig(), example.inputs())
    with pytest.raises(RuntimeError, match="seen no data"):
        convert(prepared)


def test_a_graph_of_which_one_node_saw_no_data_is_refused() -> None:
    prepared = trained(EXAMPLES["resnet"], QATConfig())
    prepared.block.conv2.output_fake_quantize.reset()
    with pytest.raises(RuntimeError, match=r"block.conv2.output_fake_quantize has seen no data"):
        convert(prepared)


def test_a_layer_that_no_data_reached_stays_float() -> None:
    inputs = torch.randn(4, 5)
    prepared = prepare(BranchNeverTaken(), QATConfig(), (inputs,))
    prepared(inputs)
    with pytest.warns(UserWarning, match=r"no data reached rare: it stays float"):
        converted = convert(prepared.eval())
    assert type(converted.rare) is nn.Linear
    with torch.no_grad():
        assert torch.equal(converted(inputs), prepared(inputs))
        assert torch.equal(converted(inputs + 1e6), converted.rare(inputs + 1e6))


@pytest.mark.parametrize("name", ["stem.weight_fake_quantize", "block.conv1.output_fake_quantize"])
def test_a_node_that_is_switched_off_is_refused(name: str) -> None:
    prepared = trained(EXAMPLES["resnet"], QATConfig())
    prepared.get_submodule(name).fake_quantize_enabled = False
    with pytest.raises(RuntimeError, match=f"{name} is switched off"):
        convert(prepared)


def test_dropout_is_gone() -> None:
    example = EXAMPLES["functional"]
    prepared = prepare(Functional(), QATConfig(), example.inputs())
    prepared(*example.inputs())
    converted = convert(prepared).train()
    batch = example.inputs()
    assert torch.equal(converted(*batch), converted(*batch))


def assert_nothing_of_training_is_left(model: nn.Module) -> None:
    for module in model.modules():
        assert not isinstance(module, (FakeQuantizeLayer, QATModuleWrapper))
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not hasattr(module, "observer_synchronizer")


@pytest.mark.parametrize("name", ["resnet", "branches at root", "single layer"])
def test_a_model_around_prepared_ones_is_converted_as_they_are(name: str) -> None:
    example = EXAMPLES[name]
    prepared, other = trained(example, QATConfig()), trained(example, QATConfig())
    around = nn.ModuleDict({"first": nn.Sequential(prepared, nn.Softmax(1)), "second": other})
    converted = convert(around)
    assert_nothing_of_training_is_left(converted)
    batch = example.inputs()
    with torch.no_grad():
        assert torch.equal(converted["first"](*batch), around["first"](*batch))
        assert torch.equal(converted["second"](*batch), other(*batch))
    assert list(converted["second"].state_dict()) == list(convert(other).state_dict())


def test_a_prepared_model_inside_without_data_is_refused() -> None:
    prepared = trained(EXAMPLES["resnet"], QATConfig())
    prepared.block.conv2.output_fake_quantize.reset()
    with pytest.raises(RuntimeError, match=r"block.conv2.output_fake_quantize has seen no data"):
        convert(nn.Sequential(prepared))


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("parallel", [None, DataParallel, DistributedDataParallel], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_the_model_inside_of_a_wrapper_is_converted(parallel: Any, compiled: bool) -> None:
    example = EXAMPLES["resnet"]
    prepared = trained(example, QATConfig())
    wrapped = prepared if parallel is None else parallel(prepared)
    converted = convert(torch.compile(wrapped, backend="eager") if compiled else wrapped)
    assert isinstance(converted, SmallResNet)
    assert_nothing_of_training_is_left(converted)
    assert_same_results(prepared, converted, example)


@pytest.mark.parametrize("branches", [False, True], ids=["traced", "not traced"])
def test_a_layer_of_two_names_is_replaced_under_both(branches: bool) -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(5, 5), nn.Linear(5, 2)
            self.alias = self.layer

        def forward(self, x: Tensor) -> Tensor:
            if branches and x.sum() == 0.5:
                return x
            return self.last(self.alias(self.layer(x)))

    inputs = torch.randn(4, 5)
    prepared = prepare(TwoNames(), QATConfig(), (inputs,))
    prepared(inputs)
    converted = convert(prepared.eval())
    assert converted.alias is converted.layer
    assert not list(converted.parameters())
    with torch.no_grad():
        assert torch.equal(converted(inputs), prepared(inputs))


def test_a_container_of_two_names_is_converted() -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
            self.alias = self.block

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(x)

    example = Example(TwoNames, (5,))
    prepared = trained(example, QATConfig())
    converted = convert(prepared)
    assert converted.alias is converted.block
    assert [type(module) for module in converted.block] == [Int8Linear, nn.Identity, Int8Linear]
    assert_same_results(prepared, converted, example)


def test_statistics_that_the_graph_reads_outlive_their_batch_norm() -> None:
    class ReadsStatistics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.bn(self.conv(x)), self.bn.running_mean * 2

    example = Example(ReadsStatistics, IMAGE)
    prepared = trained(example, QATConfig())
    converted = convert(prepared)
    assert isinstance(converted.bn, nn.Identity)
    assert_same_results(prepared, converted, example)


def test_synchronized_batch_norm_folds_like_any_other() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small_cnn())
    inputs = torch.randn(4, *IMAGE)
    prepared = prepare(model, QATConfig(), (inputs,))
    calibrate(prepared, [inputs])  # in evaluation mode, which needs no process group
    converted = convert(prepared)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    with torch.no_grad():
        assert torch.equal(converted(inputs), prepared.eval()(inputs))
