"""ONNX Runtime runs files with exact products, too, which it takes where its own saturate: those for other engines, and
with what it rewrites for that. (That it computes the same in all networks is in test_bit_equality.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.exported_file import ExportedFile, inputs_of, session_of
from export.small_networks import INTEGER_NETWORKS, SHAPE, UNEVEN_POOLS, make
from mlframework.quantization.targets import TARGETS

pytestmark = pytest.mark.slow  # exports many files

NETWORKS = {**INTEGER_NETWORKS, **UNEVEN_POOLS}


class CallsTwice(nn.Module):
    """A layer of 9 KiB is called twice, and others have as many zero points."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.called = True  # else each call is traced as a layer of its own
        return self.last(self.twice(torch.relu(self.twice(torch.relu(self.first(x))))))


def calls_twice() -> nn.Module:
    return nn.Sequential(CallsTwice(), nn.Conv2d(32, 4, 1))


ONNX_TARGETS = [name for name, target in TARGETS.items() if target.file_format == "onnx"]
OTHERS = [target for target in ONNX_TARGETS if target != "onnxruntime"]


# Every sixteenth network for each of them (test_targets and test_openvino have others); all of them in the long tests.
@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, target, marks=[] if index % 16 == 8 * place else pytest.mark.long)
        for index, name in enumerate(NETWORKS)
        for place, target in enumerate(OTHERS)
    ],
)
def test_files_for_other_engines_load(name: str, target: str, tmp_path: Path) -> None:
    file = ExportedFile.of(make(NETWORKS[name]), SHAPE, tmp_path, target)
    for exact in (False, True):
        session_of(file.path.read_bytes(), exact)


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=pytest.mark.long if name == "openvino" else ()) for name in ONNX_TARGETS]
)
def test_a_layer_called_twice(target: str, tmp_path: Path) -> None:
    file = ExportedFile.of(make(calls_twice), SHAPE, tmp_path, target)
    session_of(file.path.read_bytes(), exact=False)
    x = inputs_of(SHAPE, 200)
    with torch.no_grad():
        expected = file.converted(x)
    if target == "onnxruntime":
        assert torch.equal(file.exact_results(x), expected)
    else:  # in part floats, whose sums may fall on the other side of a boundary
        assert file.exact_results(x).shape == expected.shape


def test_only_what_is_rewritten_is_copied(tmp_path: Path) -> None:
    file = ExportedFile.of(make(calls_twice), SHAPE, tmp_path)
    assert len(weights_of(file)) == len(set(weights_of(file))) == 5
    size = file.path.stat().st_size
    file = ExportedFile.of(make(calls_twice), SHAPE, tmp_path, reduce_range=True)
    assert len(set(weights_of(file))) == 4
    twice = 32 * 32 * 9
    assert twice <= size - file.path.stat().st_size < twice + 500


def weights_of(file: ExportedFile) -> list[str]:
    """The initializers that convolutions take for weights."""
    return [file.maker(node.input[1]).input[0] for node in file.nodes("Conv")]
