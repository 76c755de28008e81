"""An observed scale of a weight is that of the weight that is trained, evaluated or converted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from combinations import half_of_all
from mlframework.quantization import (
    QATConfig,
    QATModuleWrapper,
    QuantizationParameters,
    QuantizationScheme,
    convert,
    kernels,
    prepare,
    quantize,
    verify,
)

pytestmark = pytest.mark.slow


@pytest.fixture(params=["native", pytest.param("reference", marks=pytest.mark.long)], autouse=True)
def _path(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels.reference_kernels() if request.param == "reference" else nullcontext():
        yield


class Network(nn.Module):
    """No batch normalization: the integer weights are those of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.fc = nn.Linear(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        values = torch.relu(self.conv(self.embedding(input).transpose(1, 2)))
        return self.fc(self.up(values.unsqueeze(-1)).relu().mean((2, 3)))


AXES = {"embedding": 0, "conv": 0, "up": 1, "fc": 0}
INPUTS = torch.arange(40).reshape(5, 8) % 11


def trained(config: QATConfig | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    prepared = prepare(Network(), config or QATConfig(), (INPUTS,))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.3, weight_decay=0.3)
    for _ in range(3):
        step(prepared, optimizer)
    return prepared, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model.train()(INPUTS).square().mean().backward()
    optimizer.step()


def own_scale(weight: Tensor, axis: int | None) -> Tensor:
    """By hand: the largest magnitude on the largest code."""
    values = weight.detach()
    largest = values.abs().amax().reshape(1) if axis is None else values.transpose(0, axis).flatten(1).abs().amax(1)
    return largest / 127


def assert_own_ranges(model: nn.Module, converted: nn.Module, per_channel: bool = True) -> None:
    """Codes, scales and outputs, evaluated and converted, are those of each weight's own range."""
    for name, axis in AXES.items():
        weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        along = axis if per_channel else None
        scale = own_scale(weight, along)
        scheme = QuantizationScheme(narrow_range=True, channel_axis=along)
        codes = quantize(weight.detach(), QuantizationParameters(scale, torch.zeros_like(scale), scheme))
        assert torch.equal(converted.get_submodule(name).weight, codes), name  # type: ignore[arg-type]
        assert torch.equal(model.state_dict()[f"{name}.weight_fake_quantize.scale"], scale), name


def check(model: nn.Module, per_channel: bool = True) -> None:
    """Evaluates first or converts first, on integers or simulated: all the same."""
    early = convert(model)
    for module in model.modules():
        module.training = False  # not through eval(), which would be a hint
    simulated = copy.deepcopy(model)
    simulated(INPUTS)  # with gradients
    with torch.no_grad():
        output = model(INPUTS)
        late = convert(model)
        assert torch.equal(early(INPUTS), output)
        assert torch.equal(late(INPUTS), output)
        assert torch.equal(model(INPUTS), output)
    assert_own_ranges(model, early, per_channel)
    assert_own_ranges(model, late, per_channel)
    assert_own_ranges(simulated, late, per_channel)


@torch.no_grad()
def _each_weight(model: nn.Module, change: Callable[[Tensor], object]) -> None:
    for name in AXES:
        change(model.get_submodule(name).weight)  # type: ignore[arg-type]


def _adapter(weight: Tensor) -> Tensor:
    low, rank = torch.randn(2, weight[0].numel()), torch.randn(weight.shape[0], 2)
    return weight.add_((rank @ low).view_as(weight))


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda weight: weight.mul_(3),
    "data": lambda weight: weight.data.mul_(3),
    "data, within the range": lambda weight: weight.data.neg_(),
    "data replaced": lambda weight: setattr(weight, "data", torch.randn(weight.shape)),
    "one element by data": lambda weight: weight.data.view(-1)[0].fill_(5),
    "merged adapter": _adapter,
    "zero": lambda weight: weight.zero_().view(-1)[0].fill_(1),
}


@half_of_all(change=CHANGES, per_channel={"per channel": True, "per tensor": False})
def test_a_changed_weight_brings_its_range(change: Callable[[Tensor], object], per_channel: bool) -> None:
    if not per_channel and change is CHANGES["zero"]:
        change = CHANGES["mul_"]
    prepared, _ = trained(QATConfig(per_channel_weights=per_channel))
    prepared.eval()
    with torch.no_grad():
        before = prepared(INPUTS)
        _each_weight(prepared, change)
        if change is CHANGES["zero"]:  # channels of zeros have the scale 1
            assert torch.equal(convert(prepared)(INPUTS), prepared(INPUTS))
            assert torch.equal(prepared.fc.weight_fake_quantize.scale, torch.tensor([1 / 127, 1.0, 1.0]))
            return
        assert not torch.equal(prepared(INPUTS), before)
    check(prepared, per_channel)


def test_one_step_after_the_last_forward() -> None:
    prepared, _ = trained()
    check(prepared)


def test_a_fused_step_in_evaluation_mode() -> None:
    """It leaves no trace in a tensor's version."""
    prepared, _ = trained()
    prepared.eval()
    with torch.no_grad():
        prepared(INPUTS)
    prepared(INPUTS).square().mean().backward()
    torch.optim.SGD(prepared.parameters(), lr=5.0, fused=True).step()
    check(prepared)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("ema", [True, False], ids=["exponential", "mean"])
def test_averaged_weights(use_buffers: bool, ema: bool) -> None:
    prepared, optimizer = trained()
    averaged = AveragedModel(prepared, multi_avg_fn=get_ema_multi_avg_fn(0.9) if ema else None, use_buffers=use_buffers)
    for _ in range(3):
        for _ in range(4):
            step(prepared, optimizer)
        averaged.update_parameters(prepared)
        check(averaged.module)
    check(prepared)


def test_weights_swapped_in_and_out() -> None:
    """A scale that belonged to these weights once, and to others since, is not taken for theirs."""
    prepared, optimizer = trained()
    average = {name: value.detach().clone() * 2 for name, value in prepared.named_parameters()}
    for _ in range(2):
        own = {name: value.detach().clone() for name, value in prepared.named_parameters()}
        with torch.no_grad():
            for name, parameter in prepared.named_parameters():
                parameter.copy_(average[name])
        check(prepared)
        with torch.no_grad():
            for name, parameter in prepared.named_parameters():
                parameter.copy_(own[name])
        step(prepared, optimizer)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_float_checkpoint(frozen: bool) -> None:
    prepared, _ = trained()
    for name in AXES:
        prepared.get_submodule(name).weight_fake_quantize.observer.enabled = not frozen  # type: ignore[union-attr]
    prepared.eval()
    with torch.no_grad():
        prepared(INPUTS)
    prepared.load_state_dict({key: value * 4 for key, value in Network().state_dict().items()}, strict=False)
    check(prepared)


def test_a_checkpoint_with_a_stale_scale() -> None:
    prepared, _ = trained()
    state = copy.deepcopy(prepared.state_dict())
    other, _ = trained()
    other.load_state_dict(state)
    assert not torch.equal(state["fc.weight_fake_quantize.scale"], own_scale(other.fc.weight, 0))
    check(other)


@pytest.mark.parametrize("learnable", [False, True], ids=["frozen", "learned"])
def test_frozen_and_learned_scales_stay(learnable: bool) -> None:
    prepared, _ = trained(QATConfig(learnable=learnable))
    nodes = [prepared.get_submodule(name).weight_fake_quantize for name in AXES]
    for node in nodes:
        node.observer.enabled = learnable  # type: ignore[union-attr]
    scales = [node.scale.detach().clone() for node in nodes]  # type: ignore[union-attr, operator]
    _each_weight(prepared, lambda weight: weight.mul_(3))
    prepared.eval()
    prepared(INPUTS)
    with torch.no_grad():
        output = prepared(INPUTS)
        assert torch.equal(convert(prepared)(INPUTS), output)
    assert all(torch.equal(node.scale, scale) for node, scale in zip(nodes, scales, strict=True))
    for node in nodes:
        node.observer.enabled = True  # type: ignore[union-attr]
    if not learnable:
        check(prepared)  # a frozen one follows again


def test_a_scale_set_by_hand_lasts_until_the_weight_changes() -> None:
    prepared, _ = trained()
    prepared.eval()
    with torch.no_grad():
        before = prepared(INPUTS)
        node = prepared.fc.weight_fake_quantize
        node.scale.mul_(3)
        by_hand = prepared(INPUTS)
        assert not torch.equal(by_hand, before)
        assert torch.equal(convert(prepared)(INPUTS), by_hand)
        assert torch.equal(copy.deepcopy(prepared)(INPUTS), by_hand)
    _each_weight(prepared, lambda weight: weight.mul_(2))
    check(prepared)


def test_under_inference_mode() -> None:
    prepared, _ = trained()
    prepared.eval()
    batches = prepared.fc.weight_fake_quantize.observer.batches.clone()
    with torch.inference_mode():
        prepared(INPUTS)
        _each_weight(prepared, lambda weight: weight.mul_(3))
        output = prepared(INPUTS)
    with torch.no_grad():
        assert torch.equal(prepared(INPUTS), output)
    check(prepared)
    assert torch.equal(prepared.fc.weight_fake_quantize.observer.batches, batches)  # evaluation brings none


def test_compiled_evaluation_follows_too() -> None:
    wrapper = QATModuleWrapper(nn.Linear(4, 3))
    inputs = torch.randn(5, 4)
    wrapper(inputs)
    compiled = torch.compile(wrapper.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = wrapper.weight.detach().clone()
        wrapper(inputs)
        for weight in (first * 3, first, -first):
            wrapper.weight.copy_(weight)
            output = compiled(inputs)
            assert torch.equal(wrapper.weight_fake_quantize.scale, own_scale(weight, 0))
            assert torch.equal(wrapper(inputs), output)


NAMES = {"weight": "fc.weight", "bias": "fc.bias"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("parameter", NAMES)
def test_parameters_that_are_not_finite_are_refused_by_name(value: float, parameter: str) -> None:
    message = f"^{NAMES[parameter]} holds NaN or infinite values"
    network = Network()
    with torch.no_grad():
        getattr(network.fc, parameter).view(-1)[1] = value
    with pytest.raises(ValueError, match=message):
        prepare(network, QATConfig(), (INPUTS,))
    prepare(network, QATConfig(skip=("fc",)), (INPUTS,))  # in float it may be what it likes
    prepared, _ = trained()
    with torch.no_grad():
        prepared.eval()(INPUTS)
        getattr(prepared.fc, parameter).data.view(-1)[1] = value
        with pytest.raises(ValueError, match=message):
            prepared(INPUTS)
    with pytest.raises(ValueError, match=message):
        convert(prepared)


def test_a_computed_weight_that_is_not_finite_is_refused() -> None:
    network = Network()
    with torch.no_grad():
        network.fc.weight[0] = 0
    network.fc = nn.utils.parametrizations.weight_norm(network.fc)  # which divides by zero
    with pytest.raises(ValueError, match=r"^fc\.weight holds NaN"):
        prepare(network, QATConfig(), (INPUTS,))


@pytest.mark.parametrize("part", ["weight", "running_var"])
def test_a_batch_norm_that_is_not_finite_is_refused(part: str) -> None:
    prepared = prepare(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), QATConfig(), (torch.randn(5, 4),))
    prepared(torch.randn(5, 4))
    getattr(prepared[1], part).data[0] = torch.nan
    with pytest.raises(ValueError, match=f"^{part} of the batch normalization after 0 holds NaN"):
        convert(prepared)


def test_a_layer_alone_is_refused() -> None:
    layer = nn.Linear(4, 3)
    layer.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"^weight holds NaN or infinite"):
        QATModuleWrapper(layer)


def test_a_learned_scale_loads_into_an_observed_model() -> None:
    """And lasts until the weight changes, in the model loaded as in what it is converted to."""
    learned, _ = trained(QATConfig(learnable=True))
    observed, optimizer = trained()
    observed.load_state_dict(learned.state_dict())
    with torch.no_grad():
        output = learned.eval()(INPUTS)
        assert torch.equal(observed.eval()(INPUTS), output)
        assert torch.equal(convert(observed)(INPUTS), output)
    observed.train()
    observed.load_state_dict(learned.state_dict())
    step(observed, optimizer)
    check(observed)


class Functions(nn.Module):
    """Its own code hands the weights over."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, input: Tensor) -> Tensor:
        values = F.conv1d(self.embedding(input).transpose(1, 2), self.conv.weight, self.conv.bias).relu()
        return F.linear(values.mean(2), self.fc.weight, self.fc.bias)


@pytest.mark.parametrize("config", [QATConfig(learnable=True), QATConfig(), QATConfig(weight_bits=4)])
@pytest.mark.parametrize("runs", [False, True])
def test_weights_that_code_hands_over_load_with_their_scales(config: QATConfig, runs: bool) -> None:
    """Into a model that has run, and into one that has not."""
    saved, loaded = (prepare(Functions(), config, (INPUTS,)) for _ in range(2))
    saved(INPUTS)
    if runs:
        loaded(INPUTS)
    loaded.load_state_dict(saved.state_dict())
    with torch.no_grad():
        output = saved.eval()(INPUTS)
        assert torch.equal(loaded.eval()(INPUTS), output)
        assert torch.equal(convert(loaded)(INPUTS), output)


def _held() -> tuple[nn.Module, Tensor]:
    """A model that holds a scale which its statistics do not give, and what it evaluates to."""
    saved = prepare(Functions(), QATConfig(), (INPUTS,))
    saved(INPUTS)
    (name,) = (name for name, _ in saved.named_modules() if name.endswith("conv1d"))
    saved.get_submodule(name).weight_fake_quantize.observer.enabled = False
    saved.get_submodule(name).weight_fake_quantize.scale.mul_(0.5)
    with torch.no_grad():
        return saved, saved.eval()(INPUTS)


def test_a_held_scale_of_a_weight_that_code_hands_over_lasts_until_the_weight_changes() -> None:
    saved, output = _held()
    for change in (False, True):
        loaded = prepare(Functions(), QATConfig(), (INPUTS,)).eval()
        loaded.load_state_dict(saved.state_dict())
        with torch.no_grad():
            if change:  # before the first evaluation, as an average of weights does
                loaded.conv.weight.mul_(2)
            assert torch.equal(loaded(INPUTS), output) is not change
        node = next(m for n, m in loaded.named_modules() if n.endswith("conv1d")).weight_fake_quantize
        largest = loaded.conv.weight.detach().abs().amax((1, 2))
        factor = 1.0 if change else 0.5
        torch.testing.assert_close(node.scale, factor * largest / 127, rtol=1e-6, atol=0)


def test_a_float_checkpoint_brings_the_range_of_a_weight_that_code_hands_over() -> None:
    loaded = prepare(Functions(), QATConfig(weight_bits=4), (INPUTS,))
    loaded(INPUTS)
    plain = Functions()
    loaded.load_state_dict(plain.state_dict(), strict=False)
    other = prepare(plain, QATConfig(weight_bits=4), (INPUTS,))
    with torch.no_grad():
        loaded.eval()(INPUTS)
        other(INPUTS)
    for (name, node), (_, expected) in zip(loaded.named_modules(), other.named_modules(), strict=True):
        if name.endswith("weight_fake_quantize"):
            torch.testing.assert_close(node.scale, expected.scale, rtol=0.2, atol=0)  # one searches, one follows


def test_comparing_leaves_stale_scales_as_they_are() -> None:
    prepared, _ = trained()
    state = copy.deepcopy(prepared.state_dict())
    verify(prepared, [INPUTS])
    assert all(torch.equal(value, state[key]) for key, value in prepared.state_dict().items())
    check(prepared)
