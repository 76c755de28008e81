"""What follows a product in training, in one step: as the model's modules do it one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from example_steps import (
    assert_steps_agree,
    count_operators,
    float64_step,
    needs_integer_layers,
    reference_step,
    step_of,
)
from mlframework.quantization import (
    HistogramObserver,
    MinMaxObserver,
    QATConfig,
    QATSchedule,
    StraightThroughEstimator,
    prepare,
)
from mlframework.quantization.kernels.operators.declaration import DECLARED

pytestmark = [pytest.mark.slow, needs_integer_layers]

CONFIG = QATConfig(quantize_last_linear=True)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.7, 0.4),
}
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
# Layers with inputs for them: more rows than fill a tile of 2048 elements, and a multiple of nothing.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 19), lambda **options: nn.BatchNorm1d(19, **options), (137, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 19, 3), lambda **options: nn.BatchNorm1d(19, **options), (7, 6, 23)),
    "conv2d": (
        lambda: nn.Conv2d(6, 18, 3, padding=1, bias=False),
        lambda **options: nn.BatchNorm2d(18, **options),
        (5, 6, 11, 9),
    ),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda **options: nn.BatchNorm2d(6, **options), (5, 6, 11, 9)),
}


def chain(kind: str, activation: nn.Module | None = None, **options: Any) -> nn.Sequential:
    """Layer, batch normalization and activation; some gammas are negative and one is zero."""
    make, make_batch_norm, _ = LAYERS[kind]
    batch_norm = make_batch_norm(**options)
    if batch_norm.weight is not None:
        with torch.no_grad():
            batch_norm.weight.uniform_(-1.5, 1.5)
            batch_norm.weight[0] = 0
            batch_norm.bias.uniform_(-1, 1)
    return nn.Sequential(make(), batch_norm, nn.ReLU() if activation is None else activation)


def shape_of(kind: str) -> tuple[int, ...]:
    return LAYERS[kind][2]


def trained(model: nn.Module, shape: tuple[int, ...], config: QATConfig = CONFIG, **options: Any) -> nn.Module:
    prepared = prepare(model, config, (torch.randn(shape),), **options)
    for _ in range(2):
        prepared(torch.randn(shape))
    return prepared


def step_size(prepared: nn.Module) -> float:
    return float(prepared.get_submodule("0").output_fake_quantize.scale.detach())


def beyond(shape: tuple[int, ...]) -> Tensor:
    """What exceeds in some places the ranges that training has seen."""
    return torch.randn(shape) * 1.2


@EVERY_ACTIVATION
@pytest.mark.parametrize("kind", LAYERS)
def test_a_chain_is_that_of_its_modules(
    kind: str, activation: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, input = trained(chain(kind, activation()), shape_of(kind)), beyond(shape_of(kind))
    calls = count_operators(monkeypatch, "normalize")
    actual = step_of(prepared, input)
    assert calls["normalize"] == 1
    assert_steps_agree(actual, reference_step(prepared, input), step_size(prepared))
    assert calls["normalize"] == 1, "the truth is computed otherwise"


@pytest.mark.parametrize("kind", LAYERS)
def test_a_chain_is_that_of_float64(kind: str) -> None:
    prepared, input = trained(chain(kind), shape_of(kind)), beyond(shape_of(kind))
    node = prepared.get_submodule("input_1_fake_quantize")
    input = ((input / node.scale).round() + 0.6 * (torch.rand_like(input) - 0.5)) * node.scale  # not near a tie
    assert_steps_agree(step_of(prepared, input), float64_step(prepared, input), step_size(prepared), rtol=2e-4)


CONFIGS = {
    **{target: QATConfig(target=target, quantize_last_linear=True) for target in ("openvino", "tensorrt")},
    "4 bits": QATConfig(weight_bits=4, activation_bits=4, quantize_last_linear=True),
    "per tensor": QATConfig(per_channel_weights=False, quantize_last_linear=True),
    "gradient clip": QATConfig(estimator=StraightThroughEstimator(gradient_clip=0.5), quantize_last_linear=True),
    "min max": QATConfig(activation_observer=MinMaxObserver, quantize_last_linear=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_grids_and_estimators(kind: str, config: QATConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, input = trained(chain(kind), shape_of(kind), config), beyond(shape_of(kind))
    calls = count_operators(monkeypatch, "normalize")
    assert_steps_agree(step_of(prepared, input), reference_step(prepared, input), step_size(prepared))
    assert calls["normalize"] == 1


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"momentum": 0.3}, {"momentum": 0.0}, {"affine": False}, {"eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_batch_norms_keep_their_statistics(kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, input = trained(chain(kind, **options), shape_of(kind)), beyond(shape_of(kind))
    calls = count_operators(monkeypatch, "normalize")
    actual, expected = step_of(prepared, input), reference_step(prepared, input)
    assert calls["normalize"] == 1
    assert_steps_agree(actual, expected, step_size(prepared))
    assert actual.buffers["1.num_batches_tracked"] == expected.buffers["1.num_batches_tracked"] == 3


def test_statistics_that_are_switched_off_stay() -> None:
    prepared, input = trained(chain("conv2d"), shape_of("conv2d")), beyond(shape_of("conv2d"))
    prepared.get_submodule("1").track_running_stats = False
    before = prepared.get_submodule("1").running_mean.clone()
    actual = step_of(prepared, input)
    assert_steps_agree(actual, reference_step(prepared, input), step_size(prepared))
    assert torch.equal(actual.buffers["1.running_mean"], before)


@pytest.mark.parametrize("kind", LAYERS)
def test_statistics_without_gradients_are_the_same(kind: str) -> None:
    prepared, input = trained(chain(kind), shape_of(kind)), beyond(shape_of(kind))
    expected = step_of(prepared, input)
    with torch.no_grad():
        assert torch.equal(prepared(input), expected.output)
    buffers = dict(prepared.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in expected.buffers.items())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_formats(layout: torch.memory_format) -> None:
    prepared = trained(chain("conv2d"), shape_of("conv2d"))
    input = beyond(shape_of("conv2d")).contiguous(memory_format=layout)
    assert_steps_agree(step_of(prepared, input), reference_step(prepared, input), step_size(prepared))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_recomputing_changes_no_bit(kind: str, bias: bool) -> None:
    model, shape = chain(kind), shape_of(kind)
    model[0].bias = nn.Parameter(torch.full((model[0].weight.shape[0],), 3.0)) if bias else None
    torch.manual_seed(1)
    kept = trained(model, shape)
    torch.manual_seed(1)
    recomputed = trained(chain(kind), shape, recompute=True)
    recomputed.load_state_dict(kept.state_dict(), strict=False)
    if not bias:
        recomputed.get_submodule("0").bias = None
    elif kept.get_submodule("0").bias is not None:
        recomputed.get_submodule("0").bias = nn.Parameter(kept.get_submodule("0").bias.detach().clone())
    input = beyond(shape)
    one, other = step_of(kept, input), step_of(recomputed, input)
    assert torch.equal(one.output, other.output)
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, other.gradients[name]), name
    assert all(torch.equal(buffer, other.buffers[name]) for name, buffer in one.buffers.items())


# What has to run through the modules.


HOOKS: dict[str, Callable[[nn.Module, list[str]], Any]] = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *_: seen.append("forward")),
    "forward pre": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append("pre")),
    "full backward": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append("backward")),
    "backward pre": lambda module, seen: module.register_full_backward_pre_hook(lambda *_: seen.append("back pre")),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("where", ["0.layer", "0.output_fake_quantize", "1", "2"])
def test_a_hook_fires_once_and_changes_nothing(where: str, hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, input = trained(chain("conv2d"), shape_of("conv2d")), beyond(shape_of("conv2d"))
    expected = step_of(prepared, input)
    wrapper = prepared.get_submodule("0")
    seen: list[str] = []
    hook(wrapper.layer if where == "0.layer" else prepared.get_submodule(where), seen)
    calls = count_operators(monkeypatch, "train_layer", "normalize")
    weights = torch.randn(expected.output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    input = input.clone().requires_grad_()
    output = prepared(input)
    (output * weights.float()).sum().backward()
    assert len(seen) == 1
    assert calls["normalize"] == 0 or where == "0.layer"
    assert calls["train_layer"] == (where != "0.layer")
    gradients = {"input": input.grad, **{name: each.grad for name, each in prepared.named_parameters()}}
    actual = type(expected)(output.detach(), gradients, dict(prepared.named_buffers()))
    assert_steps_agree(actual, expected, step_size(prepared))


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
    ],
    ids=lambda register: register.__name__,
)
def test_a_global_hook_sees_every_module(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, input = trained(chain("conv2d"), shape_of("conv2d")), beyond(shape_of("conv2d"))
    input.requires_grad_()
    wrapper = prepared.get_submodule("0")
    seen: list[nn.Module] = []
    calls = count_operators(monkeypatch, "train_layer", "normalize")
    handle = register(lambda module, *_: seen.append(module))
    try:
        prepared(input).sum().backward()
    finally:
        handle.remove()
    for module in (wrapper.layer, prepared.get_submodule("1"), prepared.get_submodule("2")):
        assert seen.count(module) == 1
    assert not calls


class NoisyBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "output node off": lambda prepared: setattr(
        prepared.get_submodule("0").output_fake_quantize, "fake_quantize_enabled", False
    ),
    "output node calibrating": lambda prepared: setattr(
        prepared.get_submodule("0").output_fake_quantize, "calibrating", True
    ),
    "output node reset": lambda prepared: prepared.get_submodule("0").output_fake_quantize.reset(),
}


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_statistics_that_a_schedule_freezes_normalize_in_the_same_step(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, input = trained(chain(kind), shape_of(kind)), beyond(shape_of(kind))
    QATSchedule(prepared, freeze_batch_norm_from=0)
    prepared.train()
    batch_norm = prepared.get_submodule("1")
    before = {name: buffer.clone() for name, buffer in batch_norm.named_buffers()}
    calls = count_operators(monkeypatch, "normalize", "batch_statistics")
    assert_steps_agree(step_of(prepared, input), reference_step(prepared, input), step_size(prepared))
    assert calls == {"normalize": 1}
    assert all(torch.equal(buffer, before[name]) for name, buffer in batch_norm.named_buffers())


@pytest.mark.parametrize("what", ["batch norm", "everything"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_frozen_statistics_normalize_in_the_same_step(kind: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, input = trained(chain(kind), shape_of(kind)), beyond(shape_of(kind))
    batch_norm = prepared.get_submodule("1")
    (batch_norm if what == "batch norm" else prepared).eval()
    before = {name: buffer.clone() for name, buffer in batch_norm.named_buffers()}
    calls = count_operators(monkeypatch, "normalize", "batch_statistics")
    assert_steps_agree(step_of(prepared, input), reference_step(prepared, input), step_size(prepared))
    assert calls == {"normalize": 1}
    assert all(torch.equal(buffer, before[name]) for name, buffer in batch_norm.named_buffers())


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_it_falls_back(kind: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, input = trained(chain(kind), shape_of(kind)), beyond(shape_of(kind))
    change(prepared)
    calls = count_operators(monkeypatch, "normalize")
    assert_steps_agree(step_of(prepared, input), reference_step(prepared, input), step_size(prepared))
    assert not calls


@pytest.mark.parametrize(
    "config",
    [
        QATConfig(estimator=StraightThroughEstimator(saturated="identity"), quantize_last_linear=True),
        QATConfig(activation_observer=HistogramObserver, quantize_last_linear=True),
    ],
    ids=["identity", "histogram"],
)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_nodes_that_do_more_run_as_they_are(kind: str, config: QATConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, input = trained(chain(kind), shape_of(kind), config), beyond(shape_of(kind))
    calls = count_operators(monkeypatch, "normalize", "train_layer")
    assert_steps_agree(step_of(prepared, input), reference_step(prepared, input), step_size(prepared))
    assert calls == {"train_layer": 1}


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_learned_grids_take_one_step_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = QATConfig(learnable=True, quantize_last_linear=True)
    prepared, input = trained(chain(kind), shape_of(kind), config), beyond(shape_of(kind))
    calls = count_operators(monkeypatch, "normalize", "weighted_product", "learned_normalize_backward")
    actual, expected = step_of(prepared, input), reference_step(prepared, input)
    assert calls == {"normalize": 1, "weighted_product": 1, "learned_normalize_backward": 1}
    # A value on the other side of a rounding boundary has another slope for its scale.
    assert_steps_agree(actual, expected, step_size(prepared), rtol=1e-3)


def test_other_batch_norms_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain("conv2d")
    model[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model[1])
    prepared, input = trained(model, shape_of("conv2d")), beyond(shape_of("conv2d"))
    assert isinstance(prepared.get_submodule("1"), nn.SyncBatchNorm)
    calls = count_operators(monkeypatch, "normalize")
    assert_steps_agree(step_of(prepared, input), reference_step(prepared, input), step_size(prepared))
    prepared.get_submodule("1").__class__ = NoisyBatchNorm
    prepared(input)
    assert not calls


def test_one_value_to_a_channel_is_the_modules_own_error() -> None:
    for kind in ("linear", "conv2d"):
        prepared = trained(chain(kind), shape_of(kind))
        batch_norm = prepared.get_submodule("1")
        before = batch_norm.running_mean.clone()
        prepared.get_submodule("0").layer.padding = (0, 0)
        input = torch.randn((1, *shape_of(kind)[1:]))
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            prepared(input if kind == "linear" else input[:, :, :3, :3])
        assert torch.equal(batch_norm.running_mean, before)


@pytest.mark.parametrize("where", ["input", "0.weight", "1.weight", "1.bias"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_nan_reaches_the_output(kind: str, where: str) -> None:
    prepared, input = trained(chain(kind), shape_of(kind)), beyond(shape_of(kind))
    with torch.no_grad():
        tensor = input if where == "input" else dict(prepared.named_parameters())[where]
        tensor.view(-1)[-1] = torch.nan
    actual, expected = step_of(prepared, input), reference_step(prepared, input)
    assert actual.output.isnan().any()
    assert torch.equal(actual.output.isnan(), expected.output.isnan())
    for name, buffer in actual.buffers.items():
        assert torch.equal(buffer.isnan(), expected.buffers[name].isnan()), name


def test_the_first_batch_is_only_observed() -> None:
    prepared = prepare(chain("conv2d"), CONFIG, (torch.randn(shape_of("conv2d")),))
    input = beyond(shape_of("conv2d"))
    actual, expected = step_of(prepared, input), reference_step(prepared, input)
    assert torch.equal(actual.output, expected.output)
    assert all(torch.equal(buffer, expected.buffers[name]) for name, buffer in actual.buffers.items())


# Without batch normalization: a layer's clip, sums and tables.


class Sum(nn.Module):
    """Two branches of one input, summed and clipped; the first read once more."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.activation(self.left(x) + self.right(x)))
        return result


SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "clamp": lambda x: x.clamp(-0.5, 0.25),
}
TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu in place": lambda x: F.silu(x, inplace=True),
    "hardswish": F.hardswish,
    "written out": lambda x: x * torch.sigmoid(1.7 * x) - 0.1,
    "exp": lambda x: torch.exp(3 * x),
}


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.function(self.first(x)))
        return result


GRADIENT_CLIPS = pytest.mark.parametrize("gradient_clip", [None, 0.3], ids=["unclipped", "gradient clip"])


@GRADIENT_CLIPS
@pytest.mark.parametrize("activation", SUMS.values(), ids=SUMS)
def test_sums(
    activation: Callable[[Tensor], Tensor], gradient_clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QATConfig(estimator=StraightThroughEstimator(gradient_clip=gradient_clip))
    shape = (3, 3, 9, 7)
    prepared, input = trained(Sum(activation), shape, config), beyond(shape)
    sums: list[bool] = []
    fake_quantize = DECLARED["fake_quantize"].overload
    monkeypatch.setattr(
        DECLARED["fake_quantize"],
        "overload",
        lambda input, addend, *rest: (sums.append(addend is not None), fake_quantize(input, addend, *rest))[1],
    )
    actual = step_of(prepared, input)
    assert sum(sums) == 1
    # The last layer's code may follow one of the sum's that was rounded the other way.
    node = prepared.get_submodule("last").output_fake_quantize
    assert_steps_agree(actual, reference_step(prepared, input), 2 * float(node.scale), rtol=1e-3)


@GRADIENT_CLIPS
@pytest.mark.parametrize("function", TABLES.values(), ids=TABLES)
def test_tables(
    function: Callable[[Tensor], Tensor], gradient_clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QATConfig(estimator=StraightThroughEstimator(gradient_clip=gradient_clip))
    shape = (3, 3, 9, 7)
    prepared, input = trained(Between(function), shape, config), beyond(shape)
    calls = count_operators(monkeypatch, "lookup_gradient")
    actual = step_of(prepared, input)
    assert calls["lookup_gradient"] == 1
    node = prepared.get_submodule("last").output_fake_quantize
    assert_steps_agree(actual, reference_step(prepared, input), 2 * float(node.scale), rtol=1e-3)
    assert calls["lookup_gradient"] == 1


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_a_hook_on_a_function_fires(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 1)), (3, 3, 9, 7))
    seen: list[str] = []
    hook(prepared.get_submodule("1"), seen)
    calls = count_operators(monkeypatch, "lookup_gradient")
    prepared(torch.randn(3, 3, 9, 7)).sum().backward()
    assert len(seen) == 1
    assert not calls


def test_tables_in_inference_mode() -> None:
    prepared = trained(Between(F.gelu), (3, 3, 9, 7))
    input = beyond((3, 3, 9, 7))
    with torch.no_grad():
        expected = prepared(input)
    prepared = trained(Between(F.gelu), (3, 3, 9, 7))
    with torch.inference_mode():
        first, second = prepared(input), prepared(input)
    assert first.shape == second.shape == expected.shape
    assert torch.isfinite(second).all()


def test_a_gradient_of_a_gradient_is_refused() -> None:
    for model in (chain("conv2d"), nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 1))):
        shape = (5, 6, 11, 9) if isinstance(model[1], nn.BatchNorm2d) else (5, 3, 11, 9)
        prepared, input = trained(model, shape), torch.randn(shape, requires_grad=True)
        # Of a sum, whose own gradient asks for none: the error must come all the same.
        with pytest.raises(RuntimeError, match="create_graph must be False"):
            torch.autograd.grad(prepared(input).sum(), input, create_graph=True)
