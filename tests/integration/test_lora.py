"""Low-rank adapters of ``peft``: on the float model, and on a prepared one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from example_models import EXAMPLES, train_briefly
from mlframework.quantization import QATConfig, QATModuleWrapper, calibrate, convert, prepare

pytestmark = pytest.mark.slow

LEARNABLE = pytest.mark.parametrize("learnable", [False, True])
LAYERS = {"transformer": ["qkv", "projection", "up", "down"], "resnet": ["stem", "conv1", "conv2"]}


def get_peft_model(model: nn.Module, config: Any) -> Any:
    import peft  # takes seconds, in every process that collects tests

    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def adapters(name: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=LAYERS[name], init_lora_weights=False)


def adapters_of_weights() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_parameters=[f"{layer}.weight" for layer in LAYERS["transformer"]])


def trained(model: nn.Module, inputs: tuple[Tensor, ...]) -> set[str]:
    """The parameters that training has changed."""
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    train_briefly(model, inputs, steps=3)
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}


def evaluated(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        return model.eval()(*inputs)


@LEARNABLE
@pytest.mark.parametrize("name", LAYERS)
def test_a_model_with_adapters_is_prepared_trained_and_converted(name: str, learnable: bool) -> None:
    """The adapters are layers of their own, on integers as well."""
    inputs = EXAMPLES[name].inputs()
    adapted = get_peft_model(EXAMPLES[name].make(), adapters(name))
    prepared = prepare(adapted, QATConfig(learnable=learnable), inputs)
    for layer in LAYERS[name]:
        wrappers = [
            part
            for part, module in prepared.named_modules()
            if isinstance(module, QATModuleWrapper) and f".{layer}." in f"{part}."
        ]
        assert {part.split(f"{layer}.")[-1] for part in wrappers} == {
            "base_layer", "lora_A.default", "lora_B.default"
        }  # fmt: skip
    own = {key for key, _ in prepared.named_parameters() if "fake_quantize" not in key}
    assert {key for key in trained(prepared, inputs) if key in own} == {key for key in own if "lora_" in key}
    assert torch.equal(evaluated(convert(prepared), inputs), evaluated(prepared, inputs))


@pytest.mark.parametrize("name", LAYERS)
def test_what_was_trained_so_is_merged_in_the_float_model_and_prepared_anew(name: str) -> None:
    inputs = EXAMPLES[name].inputs()
    adapted = get_peft_model(EXAMPLES[name].make(), adapters(name))
    trained(prepare(adapted, QATConfig(), inputs), inputs)  # which shares the adapters' Parameters
    expected = evaluated(adapted, inputs)
    merged = adapted.merge_and_unload()
    # Sums of floats in another order.
    torch.testing.assert_close(evaluated(merged, inputs), expected, rtol=1e-4, atol=1e-4)
    prepared = prepare(merged, QATConfig(), inputs)
    calibrate(prepared, [inputs])
    assert torch.equal(evaluated(convert(prepared), inputs), evaluated(prepared, inputs))


@LEARNABLE
def test_adapters_of_a_prepared_models_weights_are_quantized_merged(learnable: bool) -> None:
    """What is trained and evaluated is the merged weight on its grid; so merging changes nothing."""
    inputs = EXAMPLES["transformer"].inputs()
    prepared = prepare(EXAMPLES["transformer"].make(), QATConfig(learnable=learnable), inputs)
    train_briefly(prepared, inputs)
    expected = evaluated(prepared, inputs)
    adapted = get_peft_model(prepared, adapters_of_weights())
    assert torch.equal(evaluated(adapted, inputs), expected), "adapters start from zero"
    assert trained(adapted, inputs) == {key for key, _ in adapted.named_parameters() if "lora_" in key}
    expected = evaluated(adapted, inputs)
    merged = adapted.merge_and_unload()
    assert isinstance(merged.get_submodule("up"), QATModuleWrapper)
    assert torch.equal(evaluated(merged, inputs), expected)
    assert torch.equal(evaluated(convert(merged), inputs), expected)


@LEARNABLE
def test_gradients_of_adapters_are_those_of_the_merged_weights(learnable: bool) -> None:
    inputs = EXAMPLES["transformer"].inputs()
    prepared = prepare(EXAMPLES["transformer"].make(), QATConfig(learnable=learnable), inputs)
    train_briefly(prepared, inputs)
    adapted = get_peft_model(prepared, adapters_of_weights())
    trained(adapted, inputs)
    merged = copy.deepcopy(adapted).merge_and_unload().train()
    merged.requires_grad_(True)
    adapted.zero_grad()
    adapted(*inputs).square().mean().backward()
    merged(*inputs).square().mean().backward()
    for layer in LAYERS["transformer"]:
        adapter = adapted.get_submodule(f"base_model.model.{layer}")
        down, up = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
        gradient = adapter.scaling["default"] * merged.get_submodule(layer).weight.grad
        # Sums of floats in another order.
        torch.testing.assert_close(down.grad, up.T @ gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(up.grad, gradient @ down.T, rtol=1e-4, atol=1e-6)


def test_converting_adapters_that_are_not_merged_is_refused_by_name() -> None:
    inputs = EXAMPLES["transformer"].inputs()
    prepared = prepare(EXAMPLES["transformer"].make(), QATConfig(), inputs)
    train_briefly(prepared, inputs)
    adapted = get_peft_model(prepared, adapters_of_weights())
    with pytest.raises(ValueError, match=r"adapters.*qkv.*merge_and_unload\(\)"):
        convert(adapted)
    assert torch.equal(evaluated(adapted, inputs), evaluated(adapted, inputs))


def test_adapters_that_would_take_the_place_of_a_wrapper_are_refused() -> None:
    inputs = EXAMPLES["transformer"].inputs()
    prepared = prepare(EXAMPLES["transformer"].make(), QATConfig(), inputs)
    with pytest.raises(ValueError, match="QATModuleWrapper"):
        get_peft_model(prepared, adapters("transformer"))
