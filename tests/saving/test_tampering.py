"""A file that is not whole, or was changed, is refused, whoever changed it; the network stays as it was."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlframework.quantization import load
from mlframework.quantization.saving.saved_file import SavedFileError
from saved_files import (
    VALUE,
    Change,
    Document,
    Network,
    Tensors,
    call,
    call_method,
    contents,
    parts_of,
    refusal,
    rewritten,
    set_node,
    written,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("saved") / "model.safetensors")


def test_a_file_cut_at_any_length_is_refused(path: Path, tmp_path: Path) -> None:
    whole, cut, network = path.read_bytes(), tmp_path / "cut.safetensors", Network()
    before = contents(network)
    cut.write_bytes(whole + b"\0")
    for length in (len(whole) + 1, *range(len(whole) - 1, -1, -1)):
        os.truncate(cut, length)
        with pytest.raises(SavedFileError, match="must be a whole file in safetensors' format"):
            load(cut, network)
    assert contents(network) == before


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_file_with_one_bit_changed_is_refused(place: float, bit: int, path: Path, tmp_path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(content)
    refusal(changed)


def test_a_value_that_was_changed_is_named(path: Path, tmp_path: Path) -> None:
    """With the tensors' own bytes alone, on their grid still."""
    tensors, metadata = parts_of(path)
    tensors["layer.bias"] += 1
    changed = tmp_path / "changed.safetensors"
    safetensors.torch.save_file(tensors, changed, metadata)
    assert "the values of layer.bias were changed since it was written" in refusal(changed)


def entry_of(document: Document, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in document["modules"] if entry.get("class", "") == kind)
    return found


def set_value(name: str, value: float) -> Change:
    def change(document: Document, tensors: Tensors) -> None:
        tensors[name].flatten()[0] = value

    return change


def set_attribute(key: str, value: Any, kind: str = "Int8Linear") -> Change:
    def change(document: Document, tensors: Tensors) -> None:
        entry_of(document, kind)["set"][key] = value

    return change


def set_own_attribute(key: str, value: Any) -> Change:
    def change(document: Document, tensors: Tensors) -> None:
        document["modules"][0]["set"][key] = value

    return change


def set_class(name: str) -> Change:
    def change(document: Document, tensors: Tensors) -> None:
        entry_of(document, "Int8Linear")["class"] = name

    return change


def set_version(version: Any) -> Change:
    def change(document: Document, tensors: Tensors) -> None:
        document["version"] = version

    return change


def set_hook(name: str) -> Change:
    def change(document: Document, tensors: Tensors) -> None:
        document["modules"][0]["hooks"] = [["_forward_pre_hooks", name]]

    return change


def rename(old: str, new: str) -> Change:
    def change(document: Document, tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


def rename_child(old: str, new: str) -> Change:
    """In all graphs and programs, too."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {new if key == old else key: replaced(part) for key, part in value.items()}
        if isinstance(value, list):
            return [replaced(part) for part in value]
        return new if value == old else value

    def change(document: Document, tensors: Tensors) -> None:
        for key in ("modules", "sources", "records"):
            document[key] = replaced(document[key])

    return change


def reshape(document: Document, tensors: Tensors) -> None:
    tensors["layer.weight"] = tensors["layer.weight"].t().contiguous()


def widen(document: Document, tensors: Tensors) -> None:
    tensors["layer.weight"] = tensors["layer.weight"].int()


def add_child(document: Document, tensors: Tensors) -> None:
    document["modules"][0]["children"]["layer"] = 1000


def hold_itself(document: Document, tensors: Tensors) -> None:
    document["modules"][0]["children"]["inner"] = 0


def take_twice(document: Document, tensors: Tensors) -> None:
    document["modules"].append({"own": ""})


def drop_structure(document: Document, tensors: Tensors) -> None:
    del document["structure"]["head"]


def give_own_parameter_another_shape(document: Document, tensors: Tensors) -> None:
    document["modules"].append({"own": "layer", "parameters": {"weight": "q"}})
    tensors["q"] = torch.zeros(7)
    document["tensors"]["q"] = {"parameter": True}


def make_codes_a_parameter(document: Document, tensors: Tensors) -> None:
    document["tensors"]["layer.weight"] = {"parameter": True}


def shadow_class(document: Document, tensors: Tensors) -> None:
    document["modules"][0]["children"]["forward"] = 1


def set_strides(strides: Any) -> Change:
    def change(document: Document, tensors: Tensors) -> None:
        document["tensors"]["layer.weight"] = {"strides": strides}

    return change


def argument_of_the_flat_graph(document: Document, tensors: Tensors) -> None:
    document["sources"][document["modules"][0]["source"]]["flat"][0][1] = "program"


def read_later_value(document: Document, tensors: Tensors) -> None:
    document["sources"][document["modules"][0]["source"]]["form"][0][0] = {"record": ["Recipe", 1, [], [5]]}


def add_tensor(document: Document, tensors: Tensors, tensor: torch.Tensor, said: dict[str, Any] | None = None) -> None:
    tensors["added"] = tensor
    document["tensors"]["added"] = said or {}


def hide_the_weight(document: Document, tensors: Tensors) -> None:
    """What is checked is the buffer, and what a module finds first is the attribute."""
    add_tensor(document, tensors, torch.full((4, 3), -128, dtype=torch.int8))
    entry_of(document, "Int8Linear")["set"]["weight"] = {"tensor": "added"}


def hide_the_scale(document: Document, tensors: Tensors) -> None:
    add_tensor(document, tensors, torch.full((4,), torch.nan), {"parameter": False})
    entry_of(document, "Int8Linear")["parameters"] = {"weight_scale": "added"}


def take_tensors_of_another(document: Document, tensors: Tensors) -> None:
    entry = entry_of(document, "Int8Linear")
    entry["shares"] = len(document["modules"])
    document["modules"].append({"class": "torch:Identity", "buffers": dict(entry["buffers"])})


def pool_with(**settings: Any) -> Change:
    def change(document: Document, tensors: Tensors) -> None:
        document["modules"].append({"class": "torch:MaxPool2d", "set": settings})

    return change


def set_inputs_of_program(count: int) -> Change:
    def change(document: Document, tensors: Tensors) -> None:
        next(record for record in document["records"] if record[0] == "Recipe")[1] = count

    return change


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def refer_to_a_large_record_often(document: Document, tensors: Tensors) -> None:
    records = document["records"]
    large = len(records)
    records.append(["Recipe", 1, [], [0] * 200_000])
    records += [["Edge", [["item", {"same": large}]], ""] for _ in range(100)]


def follow_names_for_ever(document: Document, tensors: Tensors) -> None:
    """Each of many modules has a graph that names many tensors, a few bytes each."""
    source, first = document["sources"][0], len(document["modules"])
    names = [str(number) for number in range(700)]
    reads = [[1, f"a.{name}.weight", [], {}] for name in names]
    document["sources"].append({"graphs": [[*reads, [5, "output", [None], {}]]]})
    document["sources"][-1].update(given=[], on_codes={"dict": []}, flags=source["flags"], reads=[])
    document["modules"].append({"class": "torch:Identity", "buffers": {"weight": "layer.weight_scale"}})
    document["modules"].append({"class": "torch:Identity", "children": dict.fromkeys(names, first)})
    reading = {"class": "torch:Identity", "children": {"a": first + 1}, "source": len(document["sources"]) - 1}
    document["modules"] += [reading] * 700


NOT_SAID = "says what a file may not say: "
CHANGES: dict[str, tuple[Change, str]] = {
    "scale not a number": (
        set_value("layer.weight_scale", torch.nan),
        r"layer.weight_scale must be finite and positive, got \[nan\]",
    ),
    "scale of zero": (
        set_value("layer.output_scale", 0),
        r"layer.output_scale must be finite and positive, got \[0.0\]",
    ),
    "code off its grid": (
        set_value("layer.weight", 8),
        r"layer.weight must lie on the grid int4 \[-7, 7\] .*, got -7 to 8",
    ),
    "zero point off its grid": (
        set_value("layer.output_zero_point", 256),
        r"layer.output_zero_point must lie on the grid uint8 .*, got 256 to 256",
    ),
    "shape": (reshape, "layer.weight of 3 channels must have a scale and a bias for each"),
    "dtype": (widen, "layer.weight must be int8 with a bias of int32, got torch.int32"),
    "tensor of another name": (rename("layer.weight", "layer.wait"), "its metadata is none that save"),
    "newer version": (set_version(2), "must be of format 1, got 2, which a newer version of this library wrote"),
    "no version": (set_version("x"), "must be of format 1, got 'x'$"),
    "version that is equal": (set_version(True), "must be of format 1, got True$"),
    "class of elsewhere": (set_class("subprocess:Popen"), NOT_SAID + "subprocess:Popen is no class"),
    "class of PyTorch that becomes another": (set_class("torch:LazyLinear"), NOT_SAID + "torch:LazyLinear is no class"),
    "class of PyTorch with memory of its own": (set_class("torch:LSTM"), NOT_SAID + "torch:LSTM is no class"),
    "class of PyTorch that trusts": (set_class("torch:CTCLoss"), NOT_SAID + "torch:CTCLoss is no class"),
    "class that is no module": (set_class("QuantizationScheme"), NOT_SAID + "QuantizationScheme is no class"),
    "function that deletes files": (call("os:remove", VALUE), NOT_SAID + "os:remove is no function"),
    "function that loads files": (call("torch:load", VALUE), NOT_SAID + "torch:load is no function"),
    "function that maps files": (call("torch:from_file", "x"), NOT_SAID + "torch:from_file is no function"),
    "function that calls": (call("operator:methodcaller", "x"), NOT_SAID + "operator:methodcaller is no function"),
    "function that calls what it is given": (call("F:handle_torch_function", VALUE), NOT_SAID + "F:handle_torch"),
    "attribute as a function": (call("torch:relu.__globals__", VALUE), NOT_SAID + "torch:relu.__globals__"),
    "builtin": (call("builtins:eval", "1"), NOT_SAID + "builtins:eval is no function"),
    "record that the network does not name": (call("record:Popen", "x"), NOT_SAID + "Popen is no record"),
    "attribute behind": (call("other:getattr", VALUE, "__class__"), NOT_SAID + "a graph may not read the attribute"),
    "attribute that is a method": (call("other:getattr", VALUE, "apply_"), NOT_SAID + "a graph may not read"),
    "attribute of an unknown name": (call("other:getattr", VALUE, VALUE), NOT_SAID + "a graph may not read"),
    "attribute with a default": (call("other:getattr", VALUE, "shape", 1), NOT_SAID + "a graph may not read"),
    "method that takes code": (call_method("apply_", VALUE, VALUE), NOT_SAID + "a graph may not call .* apply_"),
    "method behind": (call_method("__reduce__", VALUE), NOT_SAID + "a graph may not call the method __reduce__"),
    "method of no tensor": (call_method("format", VALUE), NOT_SAID + "a graph may not call the method format"),
    "method of a constant": (call_method("sort", [1]), NOT_SAID + "a graph may not call the method sort"),
    "method with a key": (call_method("sort", VALUE, key=VALUE), NOT_SAID + "a graph may not call the method sort"),
    "program that is none": (call_method("run", VALUE), NOT_SAID + "a graph may not call the method run"),
    "text in quotes": (call("torch:relu", "'+x+'"), NOT_SAID + "\"'\\+x\\+'\" is no text that a call takes"),
    "text that is a call": (call("torch:relu", "f(x)"), NOT_SAID + r"'f\(x\)' is no text"),
    "text over two lines": (call("torch:relu", "x\nimport os"), NOT_SAID + "'x.*' is no text"),
    "argument that is code": (call("torch:relu", **{"x)": 1}), NOT_SAID + r"arguments may not be called x\)"),
    "argument behind": (call("torch:relu", __class__=1), NOT_SAID + "arguments may not be called __class__"),
    "value that comes later": (call("torch:relu", {"v": 99}), NOT_SAID + "a node may not read 99"),
    "value before the first": (call("torch:relu", {"v": -1}), NOT_SAID + "-1 is no number"),
    "operator with one value": (call("operator:add", VALUE), NOT_SAID + "add takes 2 values, got 1"),
    "argument twice": (set_node(0, "x", [], {}, place=-99), NOT_SAID + "'x' is no argument of a forward"),
    "module as an argument": (call("torch:relu", {"module": 0}), NOT_SAID + "'module' is no kind of value"),
    "class as an argument": (call("torch:relu", {"observer": "MinMaxObserver"}), NOT_SAID + "'observer' is no kind"),
    "module that is not there": (set_node(4, "tail", [VALUE], {}), NOT_SAID + "tail leads to nothing"),
    "module by an attribute": (set_node(4, "__class__", [VALUE], {}), NOT_SAID + "'__class__' is no name"),
    "tensor that is not there": (set_node(1, "layer.history", [], {}), NOT_SAID + "layer.history leads to nothing"),
    "tensor that is none": (set_node(1, "__dict__", [], {}), NOT_SAID + "'__dict__' is no name"),
    "argument of nothing": (set_node(0, "getattr", [], {}, place=-99), NOT_SAID + "getattr is no argument of Network"),
    "argument after a call": (set_node(0, "x", [], {}), NOT_SAID + "'x' is no argument of a forward"),
    "two results": (set_node(5, "output", [VALUE], {}), NOT_SAID + "a graph must have one result"),
    "module with code for a name": (
        rename_child("layer", "x') or print('"),
        NOT_SAID + r"\"x'\) or print\('\" is no name of a module",
    ),
    "module with letters that are others": (
        rename_child("layer", "l\uff41yer"),
        NOT_SAID + ".* is no name of a module",
    ),
    "argument of the flat graph": (argument_of_the_flat_graph, NOT_SAID),
    "program that reads too far": (read_later_value, NOT_SAID + "a program must return its values"),
    "method replaced": (set_attribute("forward", 1), NOT_SAID + "forward is no attribute that a file sets"),
    "method of PyTorch's replaced": (set_attribute("_call_impl", 1), NOT_SAID + "_call_impl is no attribute"),
    "property replaced": (set_attribute("instruction_name", "x"), NOT_SAID + "instruction_name is no attribute"),
    "attribute behind the module": (set_attribute("__class__", 1), NOT_SAID + "__class__ is no attribute"),
    "registry": (set_attribute("_forward_hooks", {"dict": []}), NOT_SAID + "_forward_hooks is no attribute"),
    "text for the network's own code": (
        set_own_attribute("command", "ls"),
        NOT_SAID + "command is text, which a file does not set",
    ),
    "hook of elsewhere": (set_hook("system"), NOT_SAID + "system is no name that a file may have"),
    "scheme of one bit": (
        set_attribute("weight_scheme", {"record": ["QuantizationScheme", 1, True, True, False, None]}),
        "bits must be between 2 and 8",
    ),
    "record that is none": (set_attribute("clip", {"record": ["Popen", "ls"]}), NOT_SAID + "Popen is no record"),
    "dtype that is none": (set_attribute("float_dtype", {"dtype": "_dynamo"}), NOT_SAID + "_dynamo is no dtype"),
    "unknown kind of value": (set_attribute("clip", {"pickle": "x"}), NOT_SAID + "'pickle' is no kind of value"),
    "no settings": (set_attribute("input_scheme", None), "layer.weight must have grids before, of and after it"),
    "settings that are none": (set_attribute("clip", "abc"), "layer.weight has a layer with settings that none has"),
    "child that is not there": (add_child, "its metadata is none that save"),
    "child that is its parent": (hold_itself, NOT_SAID + "a module holds itself"),
    "child in the place of a method": (shadow_class, NOT_SAID + "forward is no name for something in a Network"),
    "module twice": (take_twice, NOT_SAID + "two entries are one module of the network"),
    "another structure": (drop_structure, "is of another network: this one has head"),
    "parameter of another shape": (
        give_own_parameter_another_shape,
        NOT_SAID + r"layer.weight must be of shape \(4, 3\) and like torch.float32, got \(7,\)",
    ),
    "parameter of integers": (make_codes_a_parameter, NOT_SAID + "layer.weight cannot be a parameter of torch.int8"),
    "weight behind another": (hide_the_weight, NOT_SAID + "a module may not have two things called weight"),
    "scale behind another": (hide_the_scale, NOT_SAID + "a module may not have two things called weight_scale"),
    "tensors of another module": (take_tensors_of_another, NOT_SAID + "a Int8Linear may not take another module's"),
    "window beyond all": (pool_with(kernel_size=2**62), NOT_SAID + "kernel_size must be below"),
    "windows that multiply": (
        pool_with(kernel_size=[2**19, 2], dilation=[1, 2**19]),
        NOT_SAID + "dilation must be below 1024, got ",
    ),
    "program of terabytes": (set_inputs_of_program(10**13), NOT_SAID + "a program may not take 10000000000000 values"),
    "program of less than nothing": (set_inputs_of_program(-5), NOT_SAID + "a program may not take -5 values"),
    "collections in collections": (
        set_own_attribute("settings", nested(200)),
        NOT_SAID + "a value may not have more than 64 collections",
    ),
    "collections in an argument": (
        call("torch:tensor", nested(200)),
        NOT_SAID + "an argument may not have more than 64 collections",
    ),
    "numbers of one hash": (
        set_own_attribute("settings", {"set": [(2**61 - 1) * number for number in range(20_000)]}),
        NOT_SAID + ".* is no key, and in no set",
    ),
    "records that are gone through often": (
        refer_to_a_large_record_often,
        NOT_SAID + "a file may not refer to records of more than",
    ),
    "names that are followed often": (follow_names_for_ever, NOT_SAID + "graphs may not name modules by more than"),
    "strides of terabytes": (
        set_strides([2**45, 1]),
        NOT_SAID + r"a tensor of shape \(4, 3\) may not have the strides",
    ),
    "strides of nothing": (set_strides([0, 0]), NOT_SAID + "a tensor of shape"),
    "strides that overflow": (set_strides([2**80, 1]), NOT_SAID + "a tensor of shape"),
    "strides that are text": (set_strides("xy"), NOT_SAID + "a tensor of shape"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_whoever_knows_the_format_cannot_have_anything_else_loaded(
    change: Change, message: str, path: Path, tmp_path: Path
) -> None:
    changed = rewritten(path, tmp_path / "changed.safetensors", change)
    assert re.search(message, refusal(changed), re.MULTILINE)


def test_a_file_rewritten_as_it_is_loads(path: Path, tmp_path: Path) -> None:
    """So that the others fail for what was changed."""
    rewritten(path, tmp_path / "same.safetensors", lambda document, tensors: None)
    x = torch.randn(5, 3)
    assert torch.equal(load(tmp_path / "same.safetensors", Network())(x), load(path, Network())(x))


def test_other_files_in_the_format_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(dict(Network().state_dict()), other)
    assert "must be a file that save() wrote" in refusal(other)
    other.write_bytes(b"PK\3\4 a pickled state")
    assert "must be a whole file in safetensors' format" in refusal(other)


def header_of(path: Path, change: Callable[[dict[str, Any]], None]) -> bytes:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


HEADERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "more elements": lambda header: header["layer.weight"].update(shape=[2**40, 2**20]),
    "none of many": lambda header: header["layer.weight"].update(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    "numbers beyond all": lambda header: header["layer.weight"].update(shape=[2**80, 0], data_offsets=[0, 0]),
    "negative": lambda header: header["layer.weight"].update(shape=[-4, -3]),
    "true": lambda header: header["layer.weight"].update(shape=[True, 12]),
    "offsets": lambda header: header["layer.weight"].update(data_offsets=[0, 2**63]),
    "another's offsets": lambda header: header["layer.weight"].update(header["layer.bias"]),
    "dtype": lambda header: header["layer.weight"].update(dtype="U8"),
    "dtype that is none": lambda header: header["layer.weight"].update(dtype=["I8"]),
    "turned": lambda header: header["layer.weight"].update(shape=[3, 4]),
    "no entry": lambda header: header.update({"layer.weight": None}),
    "no metadata": lambda header: header.pop("__metadata__"),
    "metadata of another kind": lambda header: header.update(__metadata__=[1]),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_header_that_was_changed_is_refused_and_nothing_is_allocated(
    change: Callable[[dict[str, Any]], None], path: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(header_of(path, change))
    refusal(changed)


def test_a_header_that_names_a_tensor_twice_is_refused(path: Path, tmp_path: Path) -> None:
    """Another reader of the format may take the other one."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    entry = json.dumps({"layer.weight": {**header["layer.weight"], "shape": [12]}})
    text = f"{entry[:-1]},{json.dumps(header)[1:]}".encode()
    text += b" " * (-len(text) % 8)
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    assert "a name is there twice" in refusal(changed)


def test_tensors_that_begin_within_a_number_are_refused(path: Path, tmp_path: Path) -> None:
    """Kernels read whole numbers where these may lie."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    assert "its header must end at a multiple of 8 bytes" in refusal(changed)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":NaN}', b"\xff\xfe", b"1" * 10_000, b'"\\ud800"'])
def test_a_header_of_other_json_is_refused(content: bytes, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(len(content).to_bytes(8, "little") + content)
    refusal(other)
