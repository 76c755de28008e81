"""Programs follow their modules: settings, classes and code that change after the first call count at the next."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from example_models import all_equal, results
from mlframework.quantization import QATConfig, convert, kernels, prepare
from mlframework.quantization.int8.average_pooling import AveragePooling
from mlframework.quantization.int8.integer_module import IntegerModule, last_change
from mlframework.quantization.int8.integer_operation import Addition, Concatenation
from mlframework.quantization.int8.layers import Int8Convolution
from mlframework.quantization.int8.operations import Int8Operation, Quantize
from program_runs import module_by_module, runs_programs

pytestmark = pytest.mark.skipif(kernels.active_path() != "native", reason="programs need the compiled integer layers")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.average = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = x + self.block(x)
        return self.head(self.flatten(self.average(torch.cat([x, x], 1))).unsqueeze(-1))


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def network() -> nn.Module:
    """Converted, and run once."""
    torch.manual_seed(5)
    prepared = prepare(Network(), QATConfig(), (IMAGE,))
    prepared(IMAGE)
    converted = convert(prepared.eval())
    assert runs_programs(converted, IMAGE)
    return converted


def of_kind(network: nn.Module, kind: type[Any]) -> Any:
    found: list[Any] = [*network.children(), *network.modules()]  # the former are called, whatever stands at edges
    found += [module.operation for module in found if isinstance(module, Int8Operation)]
    found += [each.pooling for each in found if isinstance(each, AveragePooling)]
    return next(each for each in found if type(each) is kind)


SETTINGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "kernel and stride": (nn.MaxPool2d, {"kernel_size": 1, "stride": 1}),
    "stride": (nn.MaxPool2d, {"stride": 1}),
    "padding": (nn.MaxPool2d, {"padding": 1}),
    "dilation": (nn.MaxPool2d, {"dilation": 2}),
    "ceil mode": (nn.MaxPool2d, {"kernel_size": 3, "ceil_mode": True}),
    "output size": (nn.AdaptiveAvgPool2d, {"output_size": 2}),
    "first axis": (nn.Flatten, {"start_dim": 2}),
    "last axis": (nn.Flatten, {"end_dim": 1}),
    "axis": (Concatenation, {"dim": 2}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_take_effect(network: nn.Module, name: str) -> None:
    kind, settings = SETTINGS[name]
    before = results(network, IMAGE)
    owner = of_kind(network, kind)
    former = {setting: getattr(owner, setting) for setting in settings}
    vars(owner).update(settings)
    given = results(network, IMAGE)
    assert all_equal(given, module_by_module(network, IMAGE))
    assert not all_equal(given, before)
    vars(owner).update(former)
    assert runs_programs(network, IMAGE)
    assert all_equal(results(network, IMAGE), before)


def test_a_list_that_changes_takes_effect(network: nn.Module) -> None:
    of_kind(network, nn.AdaptiveAvgPool2d).output_size = size = [1, 1]
    assert runs_programs(network, IMAGE)
    size[0] = 2
    assert results(network, IMAGE)[0].shape == (2, 32, 3)


def test_settings_do_not_depend_on_the_mode(network: nn.Module) -> None:
    plan = vars(network)["_plan_of_programs"]
    network.train()
    assert runs_programs(network, IMAGE)
    assert vars(network)["_plan_of_programs"] is plan


def _reversed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with the batch in reverse order."""
    return lambda self, *args, **kwargs: forward(self, *args, **kwargs).flip(0)


@pytest.mark.parametrize("kind", [Quantize, Int8Convolution, Int8Operation, nn.Flatten])
def test_another_class_takes_effect(network: nn.Module, kind: type[nn.Module]) -> None:
    before = results(network, IMAGE)
    module = of_kind(network, kind)
    object.__setattr__(module, "__class__", type("Derived", (kind,), {"forward": _reversed(kind.forward)}))
    given = results(network, IMAGE)
    assert all_equal(given, module_by_module(network, IMAGE))
    assert not all_equal(given, before)


def test_another_class_of_a_container_takes_effect(network: nn.Module) -> None:
    before = results(network, IMAGE)
    kind = type(network.block)
    network.block.__class__ = type(
        "Derived",
        (kind,),
        {
            "__call__": _reversed(kind.__call__),
        },
    )
    given = results(network, IMAGE)
    assert all_equal(given, module_by_module(network, IMAGE))
    assert not all_equal(given, before)


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("kind", [Quantize, Int8Convolution, Int8Operation, nn.Flatten])
def test_a_forward_put_on_a_class_runs(
    network: nn.Module, kind: type[nn.Module], has_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = results(network, IMAGE)
    if not has_run:
        del vars(network)["_plan_of_programs"]
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", _reversed(kind.forward))
        given = results(network, IMAGE)
        assert all_equal(given, module_by_module(network, IMAGE))
        assert not all_equal(given, before)
    assert runs_programs(network, IMAGE)
    assert all_equal(results(network, IMAGE), before)


class ReversedSum(Addition):
    on_codes = _reversed(Addition.on_codes)


def test_a_derived_operation_runs(network: nn.Module) -> None:
    before = results(network, IMAGE)
    addition = of_kind(network, Addition)
    addition.__class__ = ReversedSum
    given = results(network, IMAGE)
    assert all_equal(given, module_by_module(network, IMAGE))
    assert not all_equal(given, before)


def test_an_operation_patched_on_its_class_runs(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = results(network, IMAGE)
    monkeypatch.setattr(Addition, "on_codes", ReversedSum.on_codes)
    given = results(network, IMAGE)
    assert all_equal(given, module_by_module(network, IMAGE))
    assert not all_equal(given, before)


def test_a_derived_layer_in_the_place_of_a_layer_runs(network: nn.Module) -> None:
    before = results(network, IMAGE)

    class Mine(Int8Convolution):
        forward = _reversed(Int8Convolution.forward)

    layer = of_kind(network, Int8Convolution)
    mine = Mine.__new__(Mine)
    vars(mine).update(vars(layer))
    (name,) = (name for name, module in network.named_modules() if module is layer)
    network.set_submodule(name, mine)
    given = results(network, IMAGE)
    assert all_equal(given, module_by_module(network, IMAGE))
    assert not all_equal(given, before)


@pytest.mark.parametrize("name", ["scale", "zero_point"])
def test_data_of_another_dtype_is_computed_with(network: nn.Module, name: str) -> None:
    before = results(network, IMAGE)
    tensor = getattr(of_kind(network, Quantize), name)
    tensor.data = tensor.double()
    given = results(network, IMAGE)
    assert all_equal(given, module_by_module(network, IMAGE))
    assert all_equal(given, before)


def test_a_default_device_leaves_programs_on(network: nn.Module) -> None:
    with torch.device("cpu"):
        assert runs_programs(network, IMAGE)


def test_a_mode_that_sees_functions_has_modules_called(network: nn.Module) -> None:
    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with torch.device("cpu"), Watching():
        assert not runs_programs(network, IMAGE)


def test_a_module_says_that_it_changed_before_anybody_looks(network: nn.Module) -> None:
    """At every step of the interpreter a thread that finds a new last change finds it with the module, too."""
    module = of_kind(network, Quantize)
    seen: list[tuple[int, int]] = []

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code is not IntegerModule._note_change.__code__:
            return None
        frame.f_trace_opcodes = True
        seen.append((last_change(), module.changed))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        module.note = 1
    finally:
        sys.settrace(before)
    assert seen[-1][1] > seen[0][1]
    assert all(changed == seen[-1][1] for last, changed in seen if last != seen[0][0])
