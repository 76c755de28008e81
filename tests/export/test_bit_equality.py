"""What ONNX Runtime computes from a file is what the converted model computes, to the last integer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from example_models import EXAMPLES, Example, train_briefly
from export.exported_file import FLOAT_COMPUTATION, ExportedFile, inputs_of, prepared_model, session_of
from export.small_networks import INTEGER_NETWORKS, SHAPE, UNEVEN_POOLS, make
from mlframework.quantization import FakeQuantizeLayer, QATConfig, QuantizationScheme, calibrate, prepare
from mlframework.quantization.verification.saturation import plain_sessions_saturate

# What is exported as another network is, which stays: a sum as in "residual", clipped as in "clipped sum"; tables of
# values as for "gelu", whatever the function; windows and axes as in "average pool", "max pool", "concat" and "mean
# over channels".
LIKE_OTHERS = {
    "sum",
    "sum with relu6",
    "concat along a line",
    "hardswish",
    "silu",
    "tanh",
    "even adaptive pool",
    "mean over rows",
    "adaptive max pool",
}

# Models whose code branches on values, which no graph can hold.
BRANCHING = ("branches inside", "branches at root")

# The last layer, which shares the embedding's weights, stays float. With the instructions of AVX2, PyTorch and ONNX
# Runtime form its float32 sums in two orders: up to 2.4e-7 apart, of values up to 4. With AVX-512 they are equal.
FLOAT_TOLERANCE = {"tied": 1e-6} if plain_sessions_saturate() else {}


def test_an_mlp(tmp_path: Path) -> None:
    file = ExportedFile.of(make(INTEGER_NETWORKS["linear layers"]), SHAPE, tmp_path)
    differing, compared = file.differences(inputs_of(SHAPE, 1000))
    assert differing == {}
    assert compared == 2  # the input and the first layer: the last one returns floats


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in LIKE_OTHERS else ()) for name in INTEGER_NETWORKS],
)
def test_integer_networks(name: str, tmp_path: Path) -> None:
    file = ExportedFile.of(make(INTEGER_NETWORKS[name]), SHAPE, tmp_path)
    differing, compared = file.differences(inputs_of(SHAPE, 1000))
    assert differing == {}
    assert compared >= 2
    assert not FLOAT_COMPUTATION & set(file.optimized_kinds())
    assert_exact_products_give_the_same(file)
    assert not FLOAT_COMPUTATION & set(file.optimized_kinds(exact=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", UNEVEN_POOLS)
def test_pools_with_windows_of_several_sizes(name: str, tmp_path: Path) -> None:
    file = ExportedFile.of(make(UNEVEN_POOLS[name]), SHAPE, tmp_path)
    assert file.differences(inputs_of(SHAPE, 1000))[0] == {}
    assert_exact_products_give_the_same(file)


def assert_exact_products_give_the_same(file: ExportedFile) -> None:
    """ONNX Runtime runs the file with exact products, too, which it takes where its own saturate; and loads it as it is
    by default."""
    x = inputs_of(SHAPE, 200)
    with torch.no_grad():
        assert torch.equal(file.exact_results(x), file.converted(x))
    session_of(file.path.read_bytes(), exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, *(pytest.param(bits, marks=pytest.mark.long) for bits in (4, 7))])
@pytest.mark.parametrize("name", ["sum with relu", "product", "concat", "leaky relu", "gelu", "padded average pool"])
def test_fewer_bits(name: str, bits: int, tmp_path: Path) -> None:
    model = make(INTEGER_NETWORKS[name])
    file = ExportedFile.of(model, SHAPE, tmp_path, activation_bits=bits, weight_bits=max(bits, 3))
    assert file.differences(inputs_of(SHAPE, 300))[0] == {}
    assert not FLOAT_COMPUTATION & set(file.optimized_kinds())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.75)], ids=str)
def test_an_activation_clips_below_the_ends_of_its_grid(activation: nn.Module, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 8, 1), activation, nn.Flatten(), nn.Linear(288, 4)]
    prepared = prepared_model(nn.Sequential(*layers), SHAPE, target)
    for name, module in prepared.named_modules():
        if isinstance(module, FakeQuantizeLayer) and name.endswith("output_fake_quantize"):
            module.scale.mul_(10)
    file = ExportedFile(prepared, (inputs_of(SHAPE, 2),), tmp_path, target)
    # In the file for TensorRT, codes are made of floats in ONNX Runtime, which fuses int8 convolutions only on request.
    differing, _ = file.differences(inputs_of(SHAPE, 200) * 3)
    assert sum(differing.values()) <= (0 if target == "onnxruntime" else 5)
    assert file.kinds["Clip"] == (0 if isinstance(activation, nn.ReLU) else 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if index % 2 else ())
        for index, name in enumerate(name for name in EXAMPLES if name not in BRANCHING)
    ],
)
@pytest.mark.filterwarnings("ignore:no data reached:UserWarning")
def test_example_models_after_training(name: str, tmp_path: Path) -> None:
    example: Example = EXAMPLES[name]
    prepared = prepare(example.make(), QATConfig(), example.inputs())
    train_briefly(prepared, example.inputs(16), steps=5, learning_rate=0.01)
    file = ExportedFile(prepared.eval(), example.inputs(), tmp_path)
    assert file.differences(*example.inputs(200), float_tolerance=FLOAT_TOLERANCE.get(name, 0.0))[0] == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "concat", "global average"])
def test_threads_change_nothing(name: str, tmp_path: Path) -> None:
    file = ExportedFile.of(make(INTEGER_NETWORKS[name]), SHAPE, tmp_path)
    x = inputs_of(SHAPE, 64)
    (one,), (two,) = file.results(x), file.results(x, threads=2)
    assert (one == two).all()


@pytest.mark.slow
def test_a_layer_left_float_between_integers_stays_float(tmp_path: Path) -> None:
    """ONNX Runtime would quantize its weights by itself."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    file = ExportedFile.of(nn.Sequential(*convolutions), SHAPE, tmp_path, skip=("2",))
    differing, _ = file.differences(inputs_of(SHAPE, 100))
    # Two libraries round float sums differently: a few codes may fall on the other side of a boundary, no more.
    assert sum(differing.values()) <= 5
    assert file.optimized_kinds()["QLinearConv"] == 2


@pytest.mark.slow
def test_codes_brought_to_another_grid_at_once_are_not_merged(tmp_path: Path) -> None:
    """ONNX Runtime would make one grid out of two that follow upon each other."""
    torch.manual_seed(0)
    prepared = prepared_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)), SHAPE)
    grid = QuantizationScheme(signed=False, symmetric=False)
    nodes = [FakeQuantizeLayer(grid) for _ in range(2)]
    model = nn.Sequential(prepared, *nodes).eval()
    calibrate(model, [inputs_of(SHAPE, 16)])
    nodes[0].scale.mul_(1.37)
    file = ExportedFile(model, (inputs_of(SHAPE, 2),), tmp_path)
    assert file.differences(inputs_of(SHAPE, 200))[0] == {}
