"""Rows times a matrix are what the layer computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization.calibration.layers_as_products import is_product, matrix_of, rows_of, weight_of

LAYERS = {
    "linear": (nn.Linear(5, 3, bias=False), (4, 7, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), bias=False), (2, 4, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding="same", bias=False), (2, 4, 5, 5)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), (2, 2, 5, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=(1, 0, 1), bias=False), (2, 2, 4, 3, 5)),
    "without a batch": (nn.Conv2d(2, 3, 3, bias=False), (2, 5, 6)),
}


def outputs_by_rows(layer: nn.Module, output: Tensor) -> Tensor:
    """A layer's output as (groups, N, outputs of a group)."""
    if isinstance(layer, nn.Linear):
        return output.reshape(1, -1, output.shape[-1])
    output = output if output.dim() == layer.weight.dim() else output[None]
    return output.transpose(0, 1).reshape(layer.groups, layer.weight.shape[0] // layer.groups, -1).mT


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_the_product_is_the_layers_output(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, input = layer.double(), torch.randn(shape, dtype=torch.float64)
    assert is_product(layer)
    with torch.no_grad():
        matrix = matrix_of(layer, layer.weight)
        expected = outputs_by_rows(layer, layer(input))
        torch.testing.assert_close(rows_of(layer, input) @ matrix.mT, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(weight_of(layer, matrix, layer.weight), layer.weight)


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("most", [1, 5, 16, 1000])
def test_rows_are_thinned_out(layer: nn.Module, shape: tuple[int, ...], most: int) -> None:
    input = torch.randn(shape, dtype=torch.float64)
    every, some = rows_of(layer, input), rows_of(layer, input, most)
    assert some.shape[1] == every.shape[1] if every.shape[1] <= most else most / 2 <= some.shape[1] < 2 * most + 1
    found = (some[:, :, None] == every[:, None]).all(-1).any(-1)
    assert bool(found.all())


def test_what_is_no_product() -> None:
    assert not is_product(nn.ConvTranspose2d(2, 2, 3))
    assert not is_product(nn.Embedding(3, 2))
    assert not is_product(nn.ReLU())
