"""Exports run a model once where there is nothing to decompose, and write the same file as with all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export.exported_file import ExportedFile, inputs_of, prepared_model
from mlframework.quantization.export import decompositions, onnx_model, optimization
from mlframework.quantization.export.optimization import (
    with_kept_decompositions,
    with_kept_translations,
    with_operators_found_once,
    without_slow_rules,
)

pytestmark = pytest.mark.slow  # exports many files


class Attention(nn.Module):
    """Views, parts of a result and sizes between integer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, 2)
        self.project = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        batch, length, _ = x.shape
        query, key, value = self.project(x).reshape(batch, length, 3, 8).unbind(2)
        attended = torch.softmax(query @ key.transpose(1, 2), -1) @ value
        return self.head(self.norm(x + self.out(attended)).mean(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.cat([x, self.second(x)], 1)[:, 4:] + x
        return self.head(x.mean((2, 3)).flatten(1))


class AssignsInPlace(nn.Module):
    """A float part that changes a tensor in place, which only decomposing turns into an operation with a result."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.softmax(x.flatten(1)[:, :16], -1)
        hidden[:, 0] = 0.5
        return self.head(hidden)


class MovesAxes(nn.Module):
    """``movedim``, of which there is no ONNX form but only one of what it is made up of."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.softmax(x, 1).movedim(1, -1)).mean((1, 2))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes when a program is decomposed."""
    found: list[str] = []
    original = torch.export.ExportedProgram.run_decompositions

    def run_decompositions(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append("decomposed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", run_decompositions)
    return found


@pytest.mark.parametrize("model", [Attention, pytest.param(Residual, marks=pytest.mark.long)])
def test_nothing_to_decompose(
    model: Callable[[], nn.Module], runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    prepared = prepared_model(model(), (3, 8, 8))
    example = (inputs_of((3, 8, 8), 2),)
    file = ExportedFile(prepared, example, tmp_path)
    assert not runs
    monkeypatch.setattr(onnx_model, "decompose_if_needed", lambda program: None)
    (tmp_path / "whole").mkdir()
    whole = ExportedFile(prepared, example, tmp_path / "whole")
    assert runs
    assert file.kinds == whole.kinds
    x = inputs_of((3, 8, 8), 5)
    assert all((one == other).all() for one, other in zip(file.results(x), whole.results(x), strict=True))


@pytest.mark.parametrize("model", [AssignsInPlace, MovesAxes])
def test_what_needs_decomposing_is_decomposed(model: Callable[[], nn.Module], runs: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = ExportedFile.of(model(), (3, 8, 8), tmp_path)
    assert runs
    differing, compared = file.differences(inputs_of((3, 8, 8), 5), float_tolerance=1e-5)
    assert compared
    assert not differing


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of PyTorch's own copy of a program
def test_a_nested_graph_is_decomposed() -> None:
    class Chooses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))  # type: ignore[no-any-return]

    program = torch.export.export(Chooses(), (torch.randn(3),))
    decompositions.decompose_if_needed(program)
    assert program.run_decompositions({}) is not program


def test_a_rule_that_is_quadratic_is_left_out_for_the_time() -> None:
    from onnxscript import rewriter

    names = [rule.name for rule in rewriter._DEFAULT_REWRITE_RULES]
    assert "SlicesSplit" in names
    with without_slow_rules():
        within = [rule.name for rule in rewriter._DEFAULT_REWRITE_RULES]
    assert within == [name for name in names if name != "SlicesSplit"]
    assert [rule.name for rule in rewriter._DEFAULT_REWRITE_RULES] == names


def test_translations_are_kept_and_each_export_has_a_table_of_its_own() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    built = ONNXRegistry.from_torchlib(opset_version=20)
    with with_kept_translations():
        first, second = (ONNXRegistry.from_torchlib(opset_version=20) for _ in range(2))
    assert first.functions.keys() == second.functions.keys() == built.functions.keys()
    for name, functions in first.functions.items():
        assert [meta.onnx_function for meta in functions] == [meta.onnx_function for meta in built.functions[name]]
        assert functions == second.functions[name]
    first.register_op(torch.ops.aten.sin.default, lambda x: x)
    assert first.functions != second.functions
    assert ONNXRegistry.from_torchlib(opset_version=20) is not second


def test_operators_that_are_declared_later_are_translated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    tables: list[int] = []

    def build(cls: type, opset_version: int) -> SimpleNamespace:
        tables.append(opset_version)
        return SimpleNamespace(functions={})

    monkeypatch.setattr(optimization, "_registries", {})
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(build))
    with torch.library._scoped_library("declared_later", "DEF") as library, with_kept_translations():
        for _ in range(2):
            ONNXRegistry.from_torchlib(opset_version=18)
        assert len(tables) == 1
        library.define("twice(Tensor x) -> Tensor")
        for _ in range(2):
            ONNXRegistry.from_torchlib(opset_version=18)
        assert len(tables) == 2


def test_decompositions_are_kept_until_there_are_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter import _decomp

    tables: list[set[Any]] = []
    build = _decomp.create_onnx_friendly_decomposition_table

    def counted(written: set[Any]) -> dict[Any, Any]:
        tables.append(written)
        return build(written)

    written = {torch.ops.aten.silu.default}
    expected = build(written)
    assert torch.ops.aten.silu.default not in expected
    monkeypatch.setattr(optimization, "_decompositions", {})
    monkeypatch.setattr(_decomp, "create_onnx_friendly_decomposition_table", counted)
    with with_kept_decompositions(), torch.library._scoped_library("declared_later", "DEF") as library:
        for _ in range(2):
            table = _decomp.create_onnx_friendly_decomposition_table(written)
            assert table.keys() == expected.keys()
            table.clear()  # is the caller's own
        assert len(tables) == 1
        assert torch.ops.aten.silu.default in _decomp.create_onnx_friendly_decomposition_table(set())
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x.cos(), "CompositeImplicitAutograd")
        assert torch.ops.declared_later.twice.default in _decomp.create_onnx_friendly_decomposition_table(written)
    assert _decomp.create_onnx_friendly_decomposition_table is counted


def test_operators_made_up_of_others_are_found_once_and_when_they_are_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._export import utils

    searches: list[str] = []
    search = utils._materialize_cpp_cia_ops

    def counted() -> None:
        searches.append("")
        search()

    with torch.library._scoped_library("declared_later", "DEF") as library:
        library.define("once(Tensor x) -> Tensor")
        library.impl("once", lambda x: x.sin(), "CompositeImplicitAutograd")
        expected = set(utils._collect_all_valid_cia_ops())
        monkeypatch.setattr(utils, "_materialize_cpp_cia_ops", counted)
        with with_operators_found_once():
            assert utils._collect_all_valid_cia_ops() == expected
            assert len(searches) == 1
            library.define("twice(Tensor x) -> Tensor")
            library.impl("twice", lambda x: x.cos(), "CompositeImplicitAutograd")
            found = set(utils._collect_all_valid_cia_ops())
            assert len(searches) == 2
        assert found - expected == {torch.ops.declared_later.twice.default}
        assert utils._materialize_cpp_cia_ops is counted
