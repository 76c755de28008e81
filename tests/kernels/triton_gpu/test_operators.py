"""Kernels for GPUs give the integers of the references, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from example_operators import LABELS_ON_GPU, ON_GPU, SUMS, assert_same, assert_same_layout, samples_on_gpu, tensors_of
from mlframework.quantization import kernels
from mlframework.quantization.kernels.operators.declaration import DECLARED

pytestmark = pytest.mark.interpreter


# Of layers with rounded floats in the long tests: what they do with these is one line, which other operators share.
# So is what a training layer is made of: those of whole ones stay.
LAYERS = ("train_layer", "folded_layer")
# And training layers of shapes that integer layers have, too, and codes that lie otherwise, which one function reads
# for all of them: integer layers have each.
SHAPES = ("conv1d", "depthwise conv1d", "linear of a vector", "linear of an empty batch", "conv2d, uneven")
LAYOUTS = ("expanded", "channels last", "half of the channels")


def is_long(name: str, label: str) -> bool:
    if name == "train_layer" and label.startswith(SHAPES):
        return True
    if name in LAYERS and any(layout in label for layout in LAYOUTS):
        return True
    return name == "weighted_product" or (name in LAYERS and "in torch." in label)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        pytest.param(name, label, marks=pytest.mark.long if is_long(name, label) else ())
        for name, label in LABELS_ON_GPU
        if name in ON_GPU
    ],
)
def test_the_reference_gives_the_same(name: str, label: str) -> None:
    operator = DECLARED[name]
    arguments = samples_on_gpu(name)[label]
    with kernels.interpreted_kernels():
        assert operator.has_kernel(arguments[0])
        actual = tensors_of(operator, operator.run(*arguments), arguments)
    torch.manual_seed(0)
    arguments = samples_on_gpu(name)[label]
    expected = tensors_of(operator, operator.reference(*arguments), arguments)
    assert len(actual) == len(expected)
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_same(one, other, SUMS.get(name, {}).get(index, 0.0))
        if one is not None:
            assert_same_layout(one, other)
