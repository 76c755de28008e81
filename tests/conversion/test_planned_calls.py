"""Programs in the place of modules: the same, bit for bit, and only where nobody could tell the difference."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from example_architectures import SmallResNet
from example_models import EVERY_EXAMPLE, EXAMPLES, Example, all_equal, results, train_briefly
from example_networks import EVERY_NETWORK
from mlframework.quantization import QATConfig, convert, kernels, prepare
from mlframework.quantization.int8.layers import Int8Layer
from mlframework.quantization.int8.operations import Quantize
from program_runs import Operators, counted_runs, module_by_module, runs_programs
from zoo import NETWORKS, roughen_batch_norms

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:no data reached spare"),
    pytest.mark.skipif(kernels.active_path() != "native", reason="programs need the compiled integer layers"),
]


def converted_example(example: Example = EXAMPLES["resnet"]) -> nn.Module:
    prepared = prepare(example.make(), QATConfig(), example.inputs())
    train_briefly(prepared, example.inputs(8))
    return convert(prepared.eval())


class Zeros(nn.Module):
    """Stands for what somebody puts in the place of a module of a converted model."""

    def forward(self, codes: Tensor, graph_variant: int = 0) -> Tensor:
        return torch.zeros_like(codes)


def layer_of(model: nn.Module) -> Int8Layer:
    return next(module for module in model.modules() if isinstance(module, Int8Layer))


@EVERY_EXAMPLE
def test_examples_give_what_their_modules_give(example: Example) -> None:
    converted = converted_example(example)
    for batch in (1, 5):
        inputs = example.inputs(batch)
        with torch.no_grad():
            given = results(converted, *inputs)
        expected = module_by_module(converted, *inputs)
        assert all_equal(given, expected)
        assert [(one.dtype, one.stride()) for one in given] == [(one.dtype, one.stride()) for one in expected]


@EVERY_NETWORK
def test_networks_give_what_their_modules_give(name: str) -> None:
    model = NETWORKS[name].make()
    roughen_batch_norms(model)
    inputs = NETWORKS[name].example_inputs(2)
    prepared = prepare(model, QATConfig(), inputs)
    prepared(*inputs)
    converted = convert(prepared.eval())
    assert runs_programs(converted, *inputs)
    for batch in (1, 3):
        inputs = NETWORKS[name].example_inputs(batch, seed=7)
        with torch.no_grad():
            given = [value for value in results(converted, *inputs) if isinstance(value, Tensor)]
        assert all_equal(given, module_by_module(converted, *inputs))


@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: x.to(memory_format=torch.channels_last), lambda x: x[:, :, ::2, ::2]]
)
def test_inputs_of_any_layout(make: Callable[[Tensor], Tensor]) -> None:
    converted = converted_example()
    image = make(torch.randn(2, 3, 16, 16))
    with torch.no_grad():
        assert all_equal(results(converted, image), module_by_module(converted, image))


def test_a_network_of_integers_is_one_program() -> None:
    network = NETWORKS["resnet20"]
    prepared = prepare(network.make(), QATConfig(), network.example_inputs(2))
    prepared(*network.example_inputs(2))
    with counted_runs() as ran, torch.no_grad():
        convert(prepared.eval())(*network.example_inputs(1))
    assert len(ran) == 1


def test_a_hook_on_any_module_sees_what_it_saw() -> None:
    converted = converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    for name, module in converted.named_modules():
        seen: list[tuple[Any, Any]] = []
        handle = module.register_forward_hook(lambda module, args, output: seen.append((args, output)))  # noqa: B023
        with torch.no_grad():
            converted(*inputs)
        by_program = list(seen)
        seen.clear()
        module_by_module(converted, *inputs)
        handle.remove()
        assert len(by_program) == len(seen), name
        for one, other in zip(by_program, seen, strict=True):
            assert all_equal([*one[0], one[1]], [*other[0], other[1]]), name
    assert runs_programs(converted, *inputs)


@pytest.mark.parametrize("hooks", ["_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"])
def test_other_hooks_have_modules_called(hooks: str) -> None:
    converted = converted_example()
    getattr(layer_of(converted), hooks)[0] = lambda *args: None
    assert not runs_programs(converted, *EXAMPLES["resnet"].inputs())


@pytest.mark.parametrize("whose", ["layer", "container"])
def test_a_forward_put_on_a_module_runs(whose: str) -> None:
    converted = converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    converted(*inputs)
    module = layer_of(converted) if whose == "layer" else converted.get_submodule("block")
    called: list[None] = []
    forward = module.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        called.append(None)
        return forward(*args, **kwargs)

    module.forward = replaced  # type: ignore[method-assign]
    converted(*inputs)
    assert called


def test_a_module_in_the_place_of_another_runs() -> None:
    converted = converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    converted(*inputs)
    name = next(name for name, module in converted.named_modules() if isinstance(module, Int8Layer))
    parent, _, last = name.rpartition(".")

    class Shifted(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, codes: Tensor) -> Tensor:
            return self.layer(codes).bitwise_xor(1)

    shifted = Shifted(converted.get_submodule(name))
    converted.get_submodule(parent)._modules[last] = shifted
    with torch.no_grad():
        assert all_equal(results(converted, *inputs), module_by_module(converted, *inputs))


@pytest.mark.parametrize("has_the_same_modules", [False, True])
def test_a_module_in_the_place_of_a_container_runs(has_the_same_modules: bool) -> None:
    converted = converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    before = results(converted, *inputs)

    zeros = Zeros()
    if has_the_same_modules:
        zeros._modules.update(converted.get_submodule("block")._modules)
    block = converted.get_submodule("block")
    converted.block = zeros
    assert not all_equal(results(converted, *inputs), before)
    converted.block = block
    assert all_equal(results(converted, *inputs), before)
    assert runs_programs(converted, *inputs)


def test_a_module_in_the_place_of_a_view_runs() -> None:
    x = torch.randn(2, 3, 4)
    prepared = prepare(nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 2)), QATConfig(), (x,))
    prepared(x)
    converted = convert(prepared.eval())
    before = results(converted, x)
    converted._modules["1"] = Zeros()
    assert not all_equal(results(converted, x), before)


def test_loaded_states_take_effect() -> None:
    first, second = converted_example(), converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    with torch.no_grad():
        before = results(second, *inputs)
        second.load_state_dict(first.state_dict())
        assert runs_programs(second, *inputs)
        assert all_equal(results(second, *inputs), results(first, *inputs))
        assert not all_equal(results(second, *inputs), before)


def test_a_scale_that_is_set_takes_effect() -> None:
    converted = converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    before = results(converted, *inputs)
    (quantize,) = [module for module in converted.children() if isinstance(module, Quantize)]
    quantize.scale = quantize.scale * 2
    assert not all_equal(results(converted, *inputs), before)
    assert all_equal(results(converted, *inputs), module_by_module(converted, *inputs))
    quantize.scale.mul_(0.5)  # in place, too
    assert all_equal(results(converted, *inputs), before)


def test_a_scale_given_for_one_call_takes_effect() -> None:
    converted = converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    before = results(converted, *inputs)
    ((name, quantize),) = [pair for pair in converted.named_children() if isinstance(pair[1], Quantize)]
    given = torch.func.functional_call(converted, {f"{name}.scale": quantize.scale * 2}, inputs)
    assert not torch.equal(given, before[0])
    assert all_equal(results(converted, *inputs), before)


def test_a_replica_runs_modules_of_its_own() -> None:
    """As DataParallel makes them: with all attributes of the model, and other modules."""
    converted = converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    with counted_runs() as ran:
        converted(*inputs)
        replica = converted._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica(*inputs)
    assert len(set(ran)) == len(ran) == 4


def test_a_cast_takes_effect() -> None:
    converted = converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    expected = [value.half() for value in results(converted, *inputs)]
    assert all_equal(results(converted.half(), *inputs), expected)
    assert runs_programs(converted, *inputs)


def test_the_mode_makes_no_difference() -> None:
    converted = converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    expected = results(converted, *inputs)
    with counted_runs() as ran:
        assert all_equal(results(converted.train(), *inputs), expected)
        assert all_equal(results(converted.eval(), *inputs), expected)
    assert ran[: len(ran) // 2] == ran[len(ran) // 2 :]  # nothing was made anew


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_programs_of_their_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    converted = converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    expected = results(converted, *inputs)
    other = duplicate(converted)
    with counted_runs() as ran:
        converted(*inputs)
        assert all_equal(results(other, *inputs), expected)
    assert len(set(ran)) == len(ran) == 4


def test_a_saved_model_is_no_larger_once_it_has_run() -> None:
    converted = converted_example()
    sizes = []
    for _ in range(2):
        file = io.BytesIO()
        torch.save(converted, file)
        sizes.append(len(file.getvalue()))
        converted(*EXAMPLES["resnet"].inputs())
    assert sizes[1] <= sizes[0] + 200


def test_operators_are_seen_by_a_mode_that_looks_for_them() -> None:
    converted = converted_example()
    with Operators() as operators, torch.no_grad():
        converted(*EXAMPLES["resnet"].inputs())
    assert "run_program.default" not in operators.names
    assert "packed_layer.default" in operators.names


@pytest.mark.filterwarnings("ignore:.torch.jit.trace(_method)?. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_and_exports_hold_no_program() -> None:
    converted = converted_example()
    (image,) = EXAMPLES["resnet"].inputs()
    with torch.no_grad():
        expected = converted(image)
        traced = torch.jit.trace(converted, image)
        exported = torch.export.export(converted, (image,))
    assert "run_program" not in str(traced.inlined_graph)
    assert "run_program" not in str(exported.graph)
    assert torch.equal(traced(image), expected)


def test_without_kernels_modules_run() -> None:
    converted = converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    expected = results(converted, *inputs)
    with kernels.reference_kernels():
        assert not runs_programs(converted, *inputs)
        assert all_equal(results(converted, *inputs), expected)


def test_gradients_are_refused_as_before() -> None:
    """An input that requires gradients gets none, and the output has no history that would promise one."""
    converted = converted_example()
    (image,) = EXAMPLES["resnet"].inputs()
    (output,) = [converted(image.requires_grad_())]
    assert not output.requires_grad


def test_integers_in_the_place_of_values_are_refused_as_before() -> None:
    converted = converted_example()
    with pytest.raises(TypeError, match=r"input must be a floating-point tensor, got torch\.uint8"):
        converted(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_double_precision_inputs_are_taken_as_before() -> None:
    converted = converted_example()
    (image,) = EXAMPLES["resnet"].inputs()
    assert all_equal(results(converted, image.double()), module_by_module(converted, image.double()))


def test_threads_share_a_model() -> None:
    converted = converted_example()
    inputs = [EXAMPLES["resnet"].inputs(batch) for batch in range(1, 9)]
    expected = [results(converted, *each) for each in inputs]
    wrong: list[int] = []

    def run(index: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                if not all_equal(results(converted, *inputs[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_another_model_that_changes_leaves_a_plan_as_it_is() -> None:
    converted, other = converted_example(), converted_example()
    inputs = EXAMPLES["resnet"].inputs()
    with counted_runs() as ran:
        converted(*inputs)
        other.half()
        converted(*inputs)
    assert ran[: len(ran) // 2] == ran[len(ran) // 2 :]


def test_a_class_is_shared_by_copies() -> None:
    converted = converted_example()
    assert isinstance(converted, SmallResNet)
    assert type(pickle.loads(pickle.dumps(converted))) is type(converted)
