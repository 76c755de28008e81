"""``torch.export`` of prepared and converted models: what programs compute, saved and loaded, here and elsewhere."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from example_models import EXAMPLES, all_equal, results
from mlframework.quantization import FakeQuantizeLayer, QATConfig, convert, prepare

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

LEARNED = pytest.mark.parametrize("learnable", [False, True], ids=["observed", "learned"])
STRICT = pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
BATCHES = (4, 7, 1)


def _prepared(name: str, learnable: bool = False) -> nn.Module:
    """A prepared model that has seen two batches."""
    example = EXAMPLES[name]
    model = prepare(example.make(), QATConfig(learnable=learnable), example.inputs())
    for _ in range(2):
        model(*example.inputs())
    return model


def _exported(model: nn.Module, name: str, strict: bool = False) -> ExportedProgram:
    """With a batch of any size."""
    shapes = ({0: Dim("batch", min=1, max=64)},)
    return torch.export.export(copy.deepcopy(model), EXAMPLES[name].inputs(), strict=strict, dynamic_shapes=shapes)


def _batches(name: str) -> list[tuple[Tensor, ...]]:
    return [EXAMPLES[name].inputs(batch) for batch in BATCHES]


def _assert_equal_on_all_batches(module: nn.Module, model: nn.Module, name: str) -> None:
    with torch.no_grad():
        for inputs in _batches(name):
            assert all_equal(results(module, *inputs), results(model, *inputs))


def _assert_packages_lose_nothing(program: ExportedProgram) -> None:
    """AOTInductor's hold neither infinite numbers nor lists without an item, for operators that are not PyTorch's."""
    calls = [node for node in program.graph.nodes if str(node.target).startswith("mlframework_quantization")]
    assert calls
    for argument in (each for node in calls for each in node.args):
        assert not (isinstance(argument, float) and math.isinf(argument))
        assert not (isinstance(argument, list) and not argument)


@pytest.mark.parametrize(
    ("name", "learnable", "strict", "gradients"),
    [
        ("resnet", False, False, False),
        pytest.param("resnet", True, False, True, marks=pytest.mark.long),
        pytest.param("transformer", False, False, True, marks=pytest.mark.long),
        ("transformer", True, True, True),
    ],
)
def test_evaluation_exports_to_the_same_integers(name: str, learnable: bool, strict: bool, gradients: bool) -> None:
    """Also where gradients were enabled: torch.export's own examples do not switch them off."""
    prepared = _prepared(name, learnable).eval()
    with torch.set_grad_enabled(gradients):
        program = _exported(prepared, name, strict)
    _assert_packages_lose_nothing(program)
    _assert_equal_on_all_batches(program.module(), prepared, name)


@pytest.mark.parametrize(
    ("name", "strict"),
    [
        ("resnet", False),
        ("transformer", True),
        *(pytest.param(*each, marks=pytest.mark.long) for each in (("resnet", True), ("transformer", False))),
    ],
)
def test_a_converted_model_exports_saves_and_loads(name: str, strict: bool, tmp_path: Path) -> None:
    converted = convert(_prepared(name).eval())
    program = _exported(converted, name, strict)
    _assert_packages_lose_nothing(program)
    _assert_equal_on_all_batches(program.module(), converted, name)
    torch.export.save(program, tmp_path / "model.pt2")
    _assert_equal_on_all_batches(torch.export.load(tmp_path / "model.pt2").module(), converted, name)


_IN_ANOTHER_PROCESS = """
import sys, torch
import mlframework.quantization
program = torch.export.load(sys.argv[1])
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save([program.module()(*each) for each in inputs], sys.argv[3])
"""


def test_another_process_loads_a_program_once_it_has_imported_the_operators(tmp_path: Path) -> None:
    model = convert(_prepared("resnet").eval())
    with torch.no_grad():
        torch.export.save(_exported(model, "resnet"), tmp_path / "model.pt2")
    torch.save(_batches("resnet"), tmp_path / "inputs.pt")
    paths = [str(tmp_path / each) for each in ("model.pt2", "inputs.pt", "outputs.pt")]
    subprocess.run([sys.executable, "-c", _IN_ANOTHER_PROCESS, *paths], check=True)
    outputs = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        expected = [model(*each) for each in torch.load(tmp_path / "inputs.pt")]
    assert all_equal(pytree.tree_leaves(outputs), expected)


@STRICT
def test_training_with_gradients_is_refused(strict: bool) -> None:
    """A program has no gradients of the operators, so that one that trained would learn from what is left."""
    # Dynamo wraps what the model raises in an error of its own.
    with pytest.raises(Exception, match="keeps no gradients of quantized training"):
        _exported(_prepared("transformer"), "transformer", strict)


def test_parts_that_train_are_refused_too() -> None:
    example = torch.randn(4, 5)
    parts: list[Any] = [FakeQuantizeLayer(), _prepared("mlp").get_submodule("0")]
    for part in parts:
        with pytest.raises(RuntimeError, match="keeps no gradients of quantized training"):
            torch.export.export(part, (example,), strict=False)


@LEARNED
def test_training_mode_without_gradients_observes_as_the_model_does(learnable: bool) -> None:
    prepared = _prepared("resnet", learnable)
    before = copy.deepcopy(prepared.state_dict())
    with torch.no_grad():
        program = _exported(prepared, "resnet")
    module = program.module()
    _assert_equal_on_all_batches(module, prepared, "resnet")
    after, expected = module.state_dict(), prepared.state_dict()
    changed = [key for key, value in expected.items() if not torch.equal(value, before[key])]
    assert any("running_mean" in key for key in changed)
    assert any("observer" in key for key in changed) is not learnable
    assert all(torch.equal(after[key], expected[key]) for key in changed)


@pytest.mark.long
def test_a_package_of_aotinductor_computes_the_same_integers(tmp_path: Path) -> None:
    shape = (3, 6, 6)
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    network = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    prepared = prepare(network, QATConfig(), (torch.randn(4, *shape),))
    for _ in range(2):
        prepared(torch.randn(4, *shape))
    model = convert(prepared.eval())
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(4, *shape),), strict=False, dynamic_shapes=({0: Dim("batch", min=1, max=64)},)
        )
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for batch in BATCHES:
            inputs = torch.randn(batch, *shape)
            assert torch.equal(loaded(inputs), model(inputs))
