"""Whole models in another dtype, or another memory format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from combinations import half_of_all
from example_models import EXAMPLES
from mlframework.quantization import FakeQuantizeLayer, QATConfig, convert, prepare

pytestmark = pytest.mark.slow

CONFIGS = {
    "observed": QATConfig(),
    "learned": QATConfig(learnable=True),
    "4 bits": QATConfig(weight_bits=4, activation_bits=4),
}


def trained(model: nn.Module, inputs: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(inputs) - 0.3).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_dtypes(model: nn.Module) -> set[torch.dtype]:
    nodes = [module for module in model.modules() if isinstance(module, FakeQuantizeLayer)]
    tensors = [tensor for node in nodes for tensor in (*node.parameters(), *node.buffers())]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


@half_of_all(
    name={name: name for name in ("resnet", "transformer")},
    dtype={str(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float64)},
    config=CONFIGS,
    when={when: when for when in ("before prepare", "after training")},
)
def test_a_model_in_a_dtype_trains_and_converts(name: str, dtype: torch.dtype, config: QATConfig, when: str) -> None:
    """To what it evaluates to, bit for bit; where the dtype cannot hold a grid, converting says so."""
    (inputs,) = EXAMPLES[name].inputs(8)
    network = EXAMPLES[name].make()
    if when == "before prepare":
        network, inputs = network.to(dtype), inputs.to(dtype)
    prepared = prepare(network, config, (inputs,))
    losses = trained(prepared, inputs, steps=8)
    assert losses[-1] < losses[0]
    prepared, inputs = prepared.to(dtype), inputs.to(dtype)
    assert state_dtypes(prepared) == {torch.float32}
    prepared.eval()
    with torch.no_grad():
        output = prepared(inputs)
        assert output.dtype is dtype
        if dtype is torch.bfloat16 and config is not CONFIGS["4 bits"]:
            with pytest.raises(ValueError, match=r"cannot tell the codes of .* apart"):
                convert(prepared)
            return
        converted = convert(prepared)(inputs)
    assert converted.dtype is dtype
    assert torch.equal(converted, output)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_in_channels_last_trains_and_converts(config: QATConfig) -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        inputs = EXAMPLES["resnet"].inputs(8)[0].contiguous(memory_format=memory_format)
        prepared = prepare(EXAMPLES["resnet"].make(), config, (inputs,)).to(memory_format=memory_format)
        losses = trained(prepared, inputs, steps=4)
        prepared.eval()
        with torch.no_grad():
            output = prepared(inputs)
            assert torch.equal(convert(prepared)(inputs), output)
        results.append(losses)
    # Sums of floats in another order, magnified by values that round to another code.
    assert results[1] == pytest.approx(results[0], rel=0.05)
