"""Small networks for files, and files that somebody has changed who knows the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mlframework.quantization import QATConfig, calibrate, convert, load, prepare, save
from mlframework.quantization.saving import saved_file
from mlframework.quantization.saving.saved_file import SavedFileError

DOCUMENT = "mlframework_quantization"


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.layer(x).relu(), 1))


class Result(NamedTuple):
    logits: Tensor
    mean: Tensor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


class Residual(nn.Module):
    """Containers, a record, attributes that are read, codes that pass between graphs, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.act, self.head = nn.Sequential(Block(), Block()), nn.GELU(), nn.Linear(3, 2)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Result:
        y = self.act(self.blocks(x))
        y = y.reshape(x.shape[0], 3, -1).mean(dim=-1) * self.scale
        return Result(self.head(y), torch.einsum("ij->i", y))


def written(path: Path) -> Path:
    """The network, converted, in a file."""
    torch.manual_seed(0)
    model = prepare(Network(), QATConfig(weight_bits=4), (torch.randn(2, 3),))
    calibrate(model, [torch.randn(8, 3)])
    save(convert(model), path)
    return path


def contents(network: nn.Module) -> list[Any]:
    return [
        (name, type(module), sorted(vars(module)), [each.tolist() for each in module.parameters()])
        for name, module in network.named_modules()
    ]


def refusal(path: Path) -> str:
    """What loading says, which leaves the network alone."""
    network = Network()
    before = contents(network)
    with pytest.raises(SavedFileError) as raised:
        load(path, network)
    assert contents(network) == before
    assert str(path) in str(raised.value)
    return str(raised.value)


def parts_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(path, "pt") as file:
        return safetensors.torch.load_file(path), file.metadata()


Document = dict[str, Any]
Tensors = dict[str, Tensor]
Change = Callable[[Document, Tensors], None]


def rewritten(path: Path, target: Path, change: Change) -> Path:
    """A file that somebody has changed who knows the format: all digests are right."""
    tensors, metadata = parts_of(path)
    document: Document = json.loads(metadata[DOCUMENT])
    said = {name: entry[1] for name, entry in document["tensors"].items()}
    version = document["version"]
    document["tensors"] = said
    change(document, tensors)
    if isinstance(document.get("tensors"), dict):
        document["tensors"] = {name: document["tensors"].get(name, {}) for name in tensors}
    if document.get("version") is version and isinstance(document.get("tensors"), dict):
        saved_file.write(target, document, tensors)
        return target
    text = json.dumps(document)
    safetensors.torch.save_file(tensors, target, saved_file._metadata(text))
    return target


def set_node(*node: Any, place: int = -1) -> Change:
    """Puts a node into the root's graph, before its result."""

    def change(document: Document, tensors: Tensors) -> None:
        source = document["sources"][document["modules"][0]["source"]]
        for graph in source["graphs"]:
            graph.insert(len(graph) + place, list(node))

    return change


def call(function: str, *args: Any, **kwargs: Any) -> Change:
    return set_node(2, function, list(args), kwargs)


def call_method(name: str, *args: Any, **kwargs: Any) -> Change:
    return set_node(3, name, list(args), kwargs)


VALUE = {"v": 0}
