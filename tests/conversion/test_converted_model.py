"""What a converted model holds, and that it can be saved, loaded, moved and copied."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from example_architectures import BranchesAtRoot, SmallResNet, TiedLanguageModel
from example_models import EVERY_EXAMPLE, EXAMPLES, SOME_EXAMPLES, Example, all_equal, results, train_briefly
from mlframework.quantization import QATConfig, QATModuleWrapper, convert, prepare
from mlframework.quantization.int8.average_pooling import AveragePooling
from mlframework.quantization.int8.integer_operation import Addition
from mlframework.quantization.int8.layers import Int8Embedding, Int8Layer
from mlframework.quantization.int8.operations import Dequantize, Int8Operation

# One of the examples has a layer that its forward never reaches, of which convert() warns.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:no data reached spare")]

# Attention, norms that do not fold, and layers that stay float keep parameters.
WITH_FLOATS = {"attention", "transformer", "unet", "unused", "preactivation", "branches at root"}
ALL_INTEGER = [name for name in EXAMPLES if name not in WITH_FLOATS]


def trained(example: Example, config: QATConfig | None = None) -> nn.Module:
    prepared = prepare(example.make(), config, example.inputs())
    train_briefly(prepared, example.inputs(8))
    return prepared.eval()


def dtypes_entering_layers(model: nn.Module, *inputs: Tensor) -> dict[str, torch.dtype]:
    entered: dict[str, torch.dtype] = {}

    def record(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            entered[name] = args[0].dtype

        return hook

    handles = [
        module.register_forward_pre_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, (Int8Layer, Int8Operation))
    ]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return entered


@cache
def prepared_and_converted(example: Example) -> tuple[nn.Module, nn.Module]:
    prepared = trained(example)
    return prepared, convert(prepared)


@EVERY_EXAMPLE
def test_weights_are_int8(example: Example) -> None:
    prepared, converted = prepared_and_converted(example)
    quantized = [module for module in prepared.modules() if isinstance(module, QATModuleWrapper)]
    layers = [module for module in converted.modules() if isinstance(module, (Int8Layer, Int8Embedding))]
    assert len(layers) == len(quantized) > 0
    assert all(layer.weight.dtype is torch.int8 for layer in layers)


@pytest.mark.parametrize("name", ALL_INTEGER)
def test_no_float_copy_of_a_quantized_weight_stays(name: str) -> None:
    """What is left in floating point are scales: one per tensor or per channel."""
    _, converted = prepared_and_converted(EXAMPLES[name])
    assert not list(converted.parameters())
    floats = {key: value for key, value in converted.named_buffers() if value.is_floating_point()}
    assert all(key.rpartition(".")[2].endswith("scale") and value.dim() == 1 for key, value in floats.items())


def test_parameters_that_another_function_reads_stay_float() -> None:
    class Tied(TiedLanguageModel):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) * self.embedding.weight.mean()

    converted = convert(trained(Example(Tied, (6,), tokens=True)))
    assert [tuple(parameter.shape) for parameter in converted.parameters()] == [(20, 8)]


@SOME_EXAMPLES
def test_codes_enter_integer_layers(example: Example) -> None:
    converted = convert(trained(example))
    entered = dtypes_entering_layers(converted, *example.inputs())
    assert entered
    assert set(entered.values()) <= {torch.uint8, torch.int8}


def test_codes_flow_from_layer_to_layer() -> None:
    example = EXAMPLES["resnet"]
    converted = convert(trained(example))
    ran: list[nn.Module] = []
    for module in converted.modules():
        if isinstance(module, Dequantize):
            module.register_forward_hook(lambda module, args, output: ran.append(module))
    converted(*example.inputs())
    assert not ran  # the head gives float of itself


def test_asking_for_a_shape_dequantizes_nothing() -> None:
    class Reshapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head(x.view(x.shape[0], x.size(1) * x.shape[2] * 2))

    inputs = torch.randn(2, 3, 4, 4)
    prepared = prepare(Reshapes(), QATConfig(), (inputs,))
    prepared(inputs)
    converted = convert(prepared.eval())
    assert not any(isinstance(module, Dequantize) for module in converted.modules())
    with torch.no_grad():
        assert torch.equal(converted(inputs), prepared(inputs))


def test_sums_add_codes() -> None:
    converted = convert(trained(EXAMPLES["resnet"]))
    operations = [module.operation for module in converted.modules() if isinstance(module, Int8Operation)]
    assert [type(operation) for operation in operations] == [Addition, AveragePooling]


@SOME_EXAMPLES
def test_a_state_dict_loads_into_another_converted_model(example: Example) -> None:
    first, second = convert(trained(example)), convert(trained(example))
    inputs = example.inputs()
    second(*inputs)  # what a layer derives from its tensors must be made anew
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    assert all_equal(results(first, *inputs), results(second, *inputs))


@SOME_EXAMPLES
def test_safetensors_take_the_state_dict(example: Example, tmp_path: Path) -> None:
    first, second = convert(trained(example)), convert(trained(example))
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    second.load_state_dict(load_file(tmp_path / "model.safetensors"))
    inputs = example.inputs()
    assert all_equal(results(first, *inputs), results(second, *inputs))


@SOME_EXAMPLES
def test_copies_compute_the_same(example: Example) -> None:
    converted = convert(trained(example))
    inputs = example.inputs()
    expected = results(converted, *inputs)
    assert all_equal(results(copy.deepcopy(converted), *inputs), expected)
    if "<lambda>" not in example.make.__qualname__:
        assert all_equal(results(pickle.loads(pickle.dumps(converted)), *inputs), expected)
    assert all_equal(results(converted.to("cpu"), *inputs), expected)


@pytest.mark.parametrize("name", ["resnet", "cnn", "called twice"])
def test_casting_to_half_leaves_the_integers_alone(name: str) -> None:
    example = EXAMPLES[name]
    converted = convert(trained(example))
    inputs = example.inputs()
    expected = results(converted, *inputs)
    assert all_equal(results(converted.to(torch.float16), *inputs), [value.half() for value in expected])


def test_a_converted_model_with_float_layers_casts_to_half() -> None:
    example = EXAMPLES["transformer"]
    converted = convert(trained(example)).to(torch.float16)
    assert converted(*(value.to(torch.float16) for value in example.inputs())).dtype is torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_model_of_another_dtype_converts(dtype: torch.dtype) -> None:
    inputs = torch.randn(4, 8, dtype=dtype)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)).to(dtype)
    # Eight digits tell 128 codes to either side of zero apart, but not 255 of one sign.
    config = QATConfig.for_target("tensorrt") if dtype is torch.bfloat16 else QATConfig()
    prepared = prepare(model, config, (inputs,))
    prepared(inputs)
    prepared.eval()
    with torch.no_grad():
        assert torch.equal(convert(prepared)(inputs), prepared(inputs))


@pytest.mark.parametrize("name", ["mlp", "resnet", "called twice"])
def test_a_dtype_that_cannot_tell_codes_apart_is_refused(name: str) -> None:
    prepared = trained(EXAMPLES[name]).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.bfloat16, which cannot tell the codes of .* apart .*torch\.autocast"):
        convert(prepared)


def test_the_file_is_about_a_quarter(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64))
    prepared = prepare(model, QATConfig(), (torch.randn(2, 256),))
    prepared(torch.randn(8, 256))
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    save_file(convert(prepared).state_dict(), tmp_path / "int8.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("int8", "float")]
    assert sizes[0] <= 0.27 * sizes[1]


def test_the_class_stays() -> None:
    assert type(convert(trained(EXAMPLES["resnet"]))).__name__ == SmallResNet.__name__
    assert isinstance(convert(trained(EXAMPLES["branches at root"])), BranchesAtRoot)


def test_a_state_of_another_scheme_is_refused_before_any_of_it_is_loaded() -> None:
    example = EXAMPLES["resnet"]
    eight = convert(trained(example))
    prepared = prepare(example.make(), QATConfig(weight_bits=8, activation_bits=4), example.inputs())
    train_briefly(prepared, example.inputs(8))
    four = convert(prepared)
    before = copy.deepcopy(eight.state_dict())
    with pytest.raises(RuntimeError, match=r"state_dict holds .* quantized as uint4 .*, expected uint8"):
        eight.load_state_dict(four.state_dict())
    assert all_equal(list(eight.state_dict().values()), list(before.values()))


def test_a_layer_that_the_graph_never_reaches_is_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match="no data reached spare: it stays float"):
        convert(trained(EXAMPLES["unused"]))
