"""Lengths that the graph of a file computes are checked before PyTorch's functions multiply them: some write behind
their result where a product has no room in a number."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.quantization import QATConfig, calibrate, convert, load, prepare, save
from mlframework.quantization.saving.guards import guarded
from mlframework.quantization.saving.saved_file import SavedFileError
from saved_files import Document, Network, Tensors, rewritten, written

NUMBER = 1 << 16  # the square of which is too long a length, and the fourth power 0

# Each node reads the one before, which is NUMBER times itself, or an image of so many elements.
CALLS: dict[str, list[Any]] = {
    "fold": [2, "F:fold", [{"v": 2}, [4, 4], 2, 1, {"v": 1}], {}],
    "max_pool1d": [2, "F:max_pool1d", [{"v": 2}, {"v": 1}], {}],
    "max_pool1d by a tensor": [2, "torch:max_pool1d", [{"v": 2}, [{"v": 3}]], {}],
    "dilation": [2, "F:max_pool1d", [{"v": 2}, 2, 1, 0, 1 << 12], {}],
    "dilation by name": [2, "F:max_pool1d", [{"v": 2}, 2], {"dilation": 1 << 12}],
    "replication": [2, "nn:replication_pad2d", [{"v": 2}, {"t": [{"v": 1}, 0, 0, 0]}], {}],
    "repetition": [2, "torch:repeat_interleave", [{"v": 2}, {"v": 3}], {}],
    "repetition of places": [2, "torch:repeat_interleave", [{"v": 3}], {}],
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("saved") / "model.safetensors")


def loaded_with(path: Path, target: Path, *nodes: list[Any]) -> nn.Module:
    """The network, with other nodes for its graph."""

    def change(document: Document, tensors: Tensors) -> None:
        source = document["sources"][document["modules"][0]["source"]]
        del source["flat"], source["form"]
        source["graphs"] = [[[0, "x", [], {}], *nodes, [5, "output", [{"v": len(nodes)}], {}]]]

    return load(rewritten(path, target, change), Network())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_lengths_that_are_computed_and_too_large_are_refused(call: list[Any], path: Path, tmp_path: Path) -> None:
    square = [2, "operator:mul", [NUMBER, NUMBER], {}]
    image = [2, "torch:ones", [[1, 4, 9]], {}]
    tensor = [2, "torch:full", [{"t": []}, {"v": 1}], {}]
    model = loaded_with(path, tmp_path / "changed.safetensors", square, image, tensor, call)
    for again in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="lengths that a saved graph computes must be below"):
            again(torch.randn(2, 3))


def test_usual_lengths_pass() -> None:
    image = torch.randn(1, 4, 9)
    assert torch.equal(guarded(F.max_pool1d)(image, 2, dilation=2), F.max_pool1d(image, 2, dilation=2))
    assert torch.equal(guarded(F.fold)(image, (4, 4), 2), F.fold(image, (4, 4), 2))
    assert torch.equal(guarded(torch.repeat_interleave)(image, 2, 1), torch.repeat_interleave(image, 2, 1))
    assert guarded(torch.relu) is torch.relu


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool1d(self.conv(x), 2)
        return F.pad(torch.repeat_interleave(y, 2, 1), (1, y.shape[-1]))


def test_a_model_that_calls_them_is_saved_copied_and_pickled(tmp_path: Path) -> None:
    """A model that has been loaded is converted and saved as another, under the functions' own names."""
    x = torch.randn(2, 3, 12)
    prepared = prepare(Windows(), QATConfig(), (x,))
    calibrate(prepared, [x])
    save(prepared, tmp_path / "prepared.safetensors")
    again = load(tmp_path / "prepared.safetensors", Windows()).eval()
    assert torch.equal(again(x), prepared.eval()(x))
    save(convert(again), tmp_path / "converted.safetensors")
    converted = load(tmp_path / "converted.safetensors", Windows())
    assert torch.equal(converted(x), convert(prepared)(x))
    assert torch.equal(pickle.loads(pickle.dumps(converted))(x), converted(x))


DIVISIONS: dict[str, Callable[[], list[Any]]] = {
    "function": lambda: [2, "torch:div", [{"v": 0}, {"v": 0}], {"rounding_mode": "trunc"}],
    "method": lambda: [3, "div_", [{"v": 0}, {"v": 0}], {"rounding_mode": "trunc"}],
}


@pytest.mark.parametrize("node", DIVISIONS.values(), ids=DIVISIONS)
def test_a_division_that_the_processor_may_trap_is_refused(
    node: Callable[[], list[Any]], path: Path, tmp_path: Path
) -> None:
    """Of the lowest integer and -1."""
    with pytest.raises(SavedFileError, match="a graph may not divide with the rounding mode trunc"):
        loaded_with(path, tmp_path / "changed.safetensors", node())


def test_a_method_repeats_by_constants_alone(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "changed.safetensors"
    repeated = loaded_with(path, target, [3, "repeat_interleave", [{"v": 0}, 2], {"dim": 1}])
    assert repeated(torch.randn(2, 3)).shape == (2, 6)
    with pytest.raises(SavedFileError, match="repeat_interleave with lengths that it computes"):
        loaded_with(path, target, [3, "repeat_interleave", [{"v": 0}, {"v": 0}], {}])
