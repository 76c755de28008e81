"""``reduce_range`` from training to the file: no weight leaves 7 bits, so that no engine's 16-bit sums saturate."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from example_architectures import small_cnn
from mlframework.quantization import QATConfig, calibrate, convert, export_onnx, prepare, verify
from mlframework.quantization.int8.layers import Int8Layer
from zoo import NETWORKS, roughen_batch_norms, train_steps, zero_some_gammas

REDUCED = QATConfig(reduce_range=True)


def int8_weights(converted: nn.Module) -> list[Tensor]:
    """The weights of the layers that multiply, and whatever other codes a table of embeddings holds."""
    state = converted.state_dict()
    return [tensor for name, tensor in state.items() if name.endswith("weight") and tensor.dtype is torch.int8]


def largest_code(codes: Tensor) -> int:
    return int(codes.int().abs().max())


@pytest.mark.parametrize("learnable", [False, True])
def test_converted_weights_use_seven_bits(learnable: bool) -> None:
    """After steps that move weights beyond their first range, and batch norms that turn signs and raise scales."""
    model, images = small_cnn(), torch.randn(8, 3, 8, 8)
    roughen_batch_norms(model)
    prepared = prepare(model, QATConfig(reduce_range=True, learnable=learnable), (images,))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        prepared(images).square().mean().backward()
        optimizer.step()
    zero_some_gammas(prepared)
    weights = int8_weights(convert(prepared))
    assert len(weights) == 3
    assert all(largest_code(codes) <= 63 for codes in weights)
    assert max(map(largest_code, weights)) == 63, "the grid is used"


def test_tables_of_embeddings_follow_unless_overridden() -> None:
    tokens = torch.randint(20, (4, 6))
    for config, expected in ((REDUCED, 63), (QATConfig(reduce_range=True, overrides={nn.Embedding: QATConfig()}), 127)):
        prepared = prepare(nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)), config, (tokens,))
        calibrate(prepared, [tokens])
        table, weight = int8_weights(convert(prepared))
        assert (largest_code(table), largest_code(weight)) == (expected, 63)


def test_a_state_of_the_full_range_is_refused() -> None:
    states = {}
    for config in (QATConfig(), REDUCED):
        states[config] = prepare(small_cnn(), config, (torch.randn(1, 3, 8, 8),)).state_dict()
    fresh = prepare(small_cnn(), REDUCED, (torch.randn(1, 3, 8, 8),))
    fresh.load_state_dict(states[REDUCED])
    with pytest.raises(RuntimeError, match=r"int8 \[-127, 127\].*, expected int7 \[-63, 63\]"):
        fresh.load_state_dict(states[QATConfig()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "mlp", *(pytest.param(name, marks=pytest.mark.long) for name in ("resnet20", "unet"))]
)
def test_the_files_weights_use_seven_bits_and_no_engine_saturates(name: str, tmp_path: Path) -> None:
    """On a processor without VNNI, ``verify`` would warn of saturation here with eight bits; warnings are errors."""
    network = NETWORKS[name]
    model = network.make()
    roughen_batch_norms(model)
    prepared = prepare(model, REDUCED, network.example_inputs(2))
    train_steps(prepared, network, steps=10)
    zero_some_gammas(prepared)
    prepared.eval()
    converted = convert(prepared)
    layers = [module for module in converted.modules() if isinstance(module, Int8Layer)]
    assert layers
    assert all(largest_code(layer.weight) <= 63 for layer in layers)

    export_onnx(converted, network.example_inputs(2), tmp_path / "model.onnx")
    initializers = map(onnx.numpy_helper.to_array, onnx.load(tmp_path / "model.onnx").graph.initializer)
    codes = [torch.from_numpy(array.copy()) for array in initializers if array.dtype == "int8"]
    assert sum(tensor.dim() > 1 for tensor in codes) >= len(layers)
    assert all(largest_code(tensor) <= 63 for tensor in codes)
    verify(prepared, [network.example_inputs(64, seed) for seed in (1, 2)], path=tmp_path / "model.onnx")
