"""A refused file has changed nothing in the network, and one that loads gives its own code numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import QATConfig, calibrate, convert, load, prepare, save
from mlframework.quantization.saving.module_contents import check_tensor_fits
from mlframework.quantization.saving.saved_file import SavedFileError
from mlframework.quantization.saving.vocabulary import NotAllowedError
from saved_files import Change, Document, Network, Tensors, refusal, rewritten, written


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("saved") / "model.safetensors")


def saved(network: nn.Module, x: Tensor, path: Path, is_converted: bool = False) -> Path:
    model = prepare(network, QATConfig(), (x,))
    calibrate(model, [x])
    save(convert(model) if is_converted else model, path)
    return path


def own(document: Document, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in document["modules"] if entry.get("own") == name)
    return found


def set_in(name: str, key: str, value: Any) -> Change:
    def change(document: Document, tensors: Tensors) -> None:
        own(document, name).setdefault("set", {})[key] = value

    return change


def share(document: Document, tensors: Tensors) -> None:
    document["modules"][0]["shares"] = 1


def set_made(key: str) -> Change:
    def change(document: Document, tensors: Tensors) -> None:
        entry = next(entry for entry in document["modules"] if entry.get("class") == "Int8Linear")
        entry["set"][key] = 1

    return change


def add_object(document: Document, tensors: Tensors) -> None:
    document["objects"].append({"class": "HostValue", "set": {"known": 1, "path": "text"}})
    own(document, "")["set"]["cache"] = {"object": len(document["objects"]) - 1}


NO_ATTRIBUTE = "is no attribute that a file sets"
REFUSED: dict[str, tuple[Change, str]] = {
    "tensors of another": (share, "of the network may not take another's tensors"),
    "module": (set_in("", "cache", {"module": 1}), "cache must be numbers or tensors, in the network and in the file"),
    "object": (add_object, "cache must be numbers or tensors"),
    "record of the library with text": (
        set_in("", "cache", {"record": ["ReportEntry", "a", "b", True, "text", 1]}),
        "cache must be numbers or tensors",
    ),
    "text in a list": (set_in("", "cache", {"list": [1, ["text"]]}), "cache is text, which a file does not set"),
    "another's report": (set_in("", "preparation_report", 1), "preparation_report may not be 1"),
    "names of modules that are none": (set_in("", "_modules_added", 5), "_modules_added must name modules, got 5"),
    **{
        f"{key} of the network": (set_in("", key, 1), f"{key} {NO_ATTRIBUTE}")
        for key in ("_compiled_call_impl", "_version", "_hf_hook", "_old_forward", "_code", "_generated_from")
    },
    **{
        f"{key} of a layer": (set_made(key), f"{key} {NO_ATTRIBUTE}")
        for key in ("_compiled_call_impl", "_version", "_hf_hook", "_old_forward", "_code", "_generated_from")
    },
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_attributes_of_the_network_are_no_way_to_its_code(
    change: Change, message: str, path: Path, tmp_path: Path
) -> None:
    assert message in refusal(rewritten(path, tmp_path / "changed.safetensors", change))


class Options:
    cache = None


class WithOptions(Network):
    def __init__(self) -> None:
        super().__init__()
        self.options = Options()


def test_objects_of_the_network_are_not_replaced(tmp_path: Path) -> None:
    path = saved(WithOptions(), torch.randn(2, 3), tmp_path / "model.safetensors")
    changed = rewritten(path, tmp_path / "changed.safetensors", set_in("", "options", 1))
    with pytest.raises(SavedFileError, match="options must be numbers or tensors, in the network and in the file"):
        load(changed, WithOptions())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cells, self.head = nn.Linear(3, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(self.layer(x))[0])


class WithComputedBuffer(Network):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("doubled", self.scale * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).relu() + self.doubled)


def sparse() -> nn.Module:
    network = Network()
    network.head.weight = nn.Parameter(network.head.weight.detach().to_sparse())
    return network


def of_mkldnn() -> nn.Module:
    network = Network()
    network.head.weight = nn.Parameter(network.head.weight.detach().to_mkldnn(), requires_grad=False)
    return network


def make_parameter(document: Document, tensors: Tensors) -> None:
    document["tensors"]["doubled"]["parameter"] = False


def unchanged(document: Document, tensors: Tensors) -> None:
    pass


LATE: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Change, str]] = {
    "names of weights": (
        Recurrent,
        Recurrent,
        set_in("cells", "_flat_weights_names", 5),
        f"_flat_weights_names {NO_ATTRIBUTE}",
    ),
    "buffer that is no leaf": (
        WithComputedBuffer,
        WithComputedBuffer,
        make_parameter,
        "doubled must be no parameter, as in the network",
    ),
    "sparse network": (Network, sparse, unchanged, "head.weight must be of strided memory in the network"),
    "network of mkldnn": (Network, of_mkldnn, unchanged, "head.weight must be of strided memory in the network"),
}


@pytest.mark.parametrize(("make", "make_other", "change", "message"), LATE.values(), ids=LATE)
def test_what_would_fail_half_way_is_refused_before(
    make: Callable[[], nn.Module],
    make_other: Callable[[], nn.Module],
    change: Change,
    message: str,
    tmp_path: Path,
) -> None:
    x = torch.randn(2, 5, 3) if make is Recurrent else torch.randn(2, 3)
    path = saved(make(), x, tmp_path / "model.safetensors")
    network = make_other()
    before = [(name, id(each), each._version) for name, each in network.state_dict(keep_vars=True).items()]
    values = [each.detach().clone().to_dense() for each in network.parameters()]
    attributes = [sorted(vars(module)) for module in network.modules()]
    with pytest.raises(SavedFileError, match=message):
        load(rewritten(path, tmp_path / "changed.safetensors", change), network)
    assert [(name, id(each), each._version) for name, each in network.state_dict(keep_vars=True).items()] == before
    assert all(
        torch.equal(each.detach().to_dense(), value) for each, value in zip(network.parameters(), values, strict=True)
    )
    assert [sorted(vars(module)) for module in network.modules()] == attributes


def test_a_network_on_two_devices_is_refused_before() -> None:
    """A tensor of another device cannot be put in the place of one."""
    loaded, present = torch.zeros(2, device="meta"), nn.Parameter(torch.zeros(2))
    with pytest.raises(NotAllowedError, match=r"layer\.bias must be on meta, as others of the network are, got cpu"):
        check_tensor_fits("layer.bias", loaded, present, True)


def test_what_quantizes_has_tensors_of_its_own(tmp_path: Path) -> None:
    """A layer that learns its scale has every optimizer change it, from before the file is accepted."""

    def change(document: Document, tensors: Tensors) -> None:
        layer = next(entry for entry in document["modules"] if entry.get("class") == "FakeQuantizeLayer")
        layer["buffers"]["scale"] = "layer.bias"

    path = saved(Network(), torch.randn(2, 3), tmp_path / "model.safetensors")
    said = refusal(rewritten(path, tmp_path / "changed.safetensors", change))
    assert "layer.bias is the network's own, and none of a FakeQuantizeLayer" in said


def chain(record: list[Any], length: int) -> Change:
    """Each holds the one before twice."""

    def change(document: Document, tensors: Tensors) -> None:
        first = len(document["records"])
        document["records"].append(["Given", "x", 1])
        for number in range(first, first + length):
            document["records"].append([*record, [{"same": number}, {"same": number}]])

    return change


def share_of_shares(document: Document, tensors: Tensors) -> None:
    document["records"] += [["Share", 1, 2], ["Share", {"same": len(document["records"])}, 3]]


def lengthy(document: Document, tensors: Tensors) -> None:
    document["records"].append(["Share", "x" * 100_000, 1])


RECORDS: dict[str, tuple[Change, str]] = {
    "many": (chain(["Given", "x"], 60), "a record may not be of more than 300000 parts, 16 within each other"),
    "of another type": (share_of_shares, "quantized of a Share may not be a Share"),
    "long": (lengthy, "quantized of a Share may not be xxx"),
}


@pytest.mark.parametrize(("change", "message"), RECORDS.values(), ids=RECORDS)
def test_records_are_small_and_of_their_types(change: Change, message: str, path: Path, tmp_path: Path) -> None:
    said = refusal(rewritten(path, tmp_path / "changed.safetensors", change))
    assert message in said
    assert len(said) < 600
