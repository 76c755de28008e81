"""Whatever a file says: it loads, or is refused by the one error with the network as it was; and nothing runs that it
asks for."""

from __future__ import annotations

import builtins
import copy
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mlframework.quantization import QATConfig, calibrate, convert, load, prepare, save
from mlframework.quantization.graph.generated_forward import write_code
from mlframework.quantization.saving import saved_file
from mlframework.quantization.saving.saved_file import SavedFileError
from saved_files import Residual

HOSTILE: tuple[Any, ...] = (
    "__class__", "__globals__", "__builtins__", "os.system", "os:system", "builtins:eval", "eval", "exec", "self", "",
    "__import__('os').system('false')", "'+__import__('os').system('false')+'", "x); __import__('os')", "torch:load",
    "x\nimport os", "getattr", "forward", "a.b.c", "record:Popen", "torch:relu.__globals__", "\uff41", "\ud800",
    "x" * 9999, "torch:LazyLinear", "observer:object", "_call_impl", "apply_", "run", "program_0", "graph_variant",
    0, 1, -1, 7, 2**31, 2**63, 10**400, 1.5, 1e308, True, False, None, [], {}, [[]], {"v": 0}, {"v": 10**9}, {"v": -1},
    {"module": 0}, {"tensor": "blocks.0.conv.weight"}, {"object": 0}, {"same": 0}, {"record": ["Popen"]},
    {"float": "nan"}, {"record": ["QATConfig"]}, {"dict": [[1, 2]]}, {"list": [[1]]}, {"a": 1, "b": 2},
    {"size": [2**40]}, {"dtype": "os"},
)  # fmt: skip

COUNT = 60  # of changed files of each kind


class HostileCallError(BaseException):
    """Something ran that no file may ask for."""


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise HostileCallError(args)

    def only_others(run: Any) -> Any:
        def checked(code: Any, *args: Any) -> Any:
            if code in HOSTILE or (isinstance(code, str) and "import" in code):
                refuse(code)
            return run(code, *args)

        return checked

    for owner, name in ((os, "system"), (os, "popen"), (subprocess, "Popen"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    for name in ("eval", "exec", "__import__"):
        monkeypatch.setattr(builtins, name, only_others(getattr(builtins, name)))


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values and keys."""
    if path:
        yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_in(part, (*path, key))


def mutate(document: Any, random_: random.Random) -> str:
    """Changes a value, a key, the order or the number of parts somewhere, in place; says what."""
    places = list(places_in(document))
    path = random_.choice(places)
    owner = document
    for step in path[:-1]:
        owner = owner[step]
    last, kind = path[-1], random_.choice(("value", "value", "value", "remove", "double", "key", "nest", "other"))
    replacement = copy.deepcopy(random_.choice(HOSTILE))
    if kind == "remove":
        del owner[last]
    elif kind == "double" and isinstance(owner, list):
        owner.insert(last, copy.deepcopy(owner[last]))
    elif kind == "key" and isinstance(owner, dict):
        owner[str(replacement)] = owner.pop(last)
    elif kind == "nest":
        for _ in range(random_.choice((1, 2, 500))):
            owner[last] = [owner[last]] if random_.random() < 0.5 else {"list": [owner[last]]}
    elif kind == "other":
        other: Any = document
        for step in random_.choice(places):
            other = other[step] if not isinstance(other, (dict, list)) or _has(other, step) else replacement
        owner[last] = copy.deepcopy(other)
    else:
        owner[last] = replacement
    return f"{kind} of {path}: {str(replacement)[:80]!r}"


def _has(value: Any, step: Any) -> bool:
    return step in value if isinstance(value, dict) else isinstance(step, int) and step < len(value)


def contents(network: nn.Module) -> list[Any]:
    found: list[Any] = []
    for name, module in network.named_modules():
        found += [name, type(module), sorted(vars(module)), list(module._modules), module.training]
        tensors = (*module._parameters.items(), *module._buffers.items())
        found += [(key, id(each), each.sum()) for key, each in tensors if each is not None]
    return found


def attack(path: Path, target: Path, seed: int, x: Tensor) -> str:
    """Loads a file with changes, all digests right; returns what came of it."""
    random_ = random.Random(seed)
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = safetensors.torch.load_file(path), file.metadata()
    document = json.loads(metadata["mlframework_quantization"])
    try:
        what = [mutate(document, random_) for _ in range(random_.choice((1, 1, 1, 2, 4)))]
        text = json.dumps(document)
        safetensors.torch.save_file(tensors, target, saved_file._metadata(text))
    except (RecursionError, UnicodeEncodeError, ValueError):  # JSON has no form for it
        return "not written"
    network = Residual()
    error: Exception | None = None
    before = contents(network)
    try:
        model = load(target, network)
    except Exception as raised:
        error = raised
    if error is not None:
        assert isinstance(error, SavedFileError), what
        assert str(target) in str(error), what
        assert contents(network) == before, what
        return "refused"
    for module in model.modules():
        write_code(module)
    try:
        with torch.no_grad():
            model(x)
    except Exception:  # what is loaded may be of no use, for numbers are what they are
        return "loaded, fails"
    return "loaded"


@pytest.fixture(scope="module", params=["converted", "prepared"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    model = prepare(Residual(), QATConfig(), (x,))
    calibrate(model, [x])
    model = convert(model) if request.param == "converted" else model
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save(model, path)
    assert torch.equal(load(path, Residual()).eval()(x).logits, model.eval()(x).logits)
    return path, model


@pytest.mark.usefixtures("canary")
def test_no_change_of_the_metadata_runs_anything(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, _ = saved
    x = torch.randn(2, 3, 5, 5)
    outcomes = [attack(path, tmp_path / "changed.safetensors", seed, x) for seed in range(COUNT)]
    assert outcomes.count("refused") > COUNT // 3
