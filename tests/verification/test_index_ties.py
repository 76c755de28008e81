"""Indices of equal values are ties; indices of others are faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import QATConfig, calibrate, export_onnx, prepare, verify
from mlframework.quantization.verification.compare import VerificationError
from mlframework.quantization.verification.index_ties import IndexTies

pytestmark = pytest.mark.slow

VALUES = torch.tensor([[3.0, 5.0, 5.0, 1.0], [2.0, 2.0, 2.0, 7.0]])


class Chooses(nn.Module):
    def __init__(self, choose: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.choose = choose

    def forward(self, x: Tensor) -> Any:
        return self.choose(x)


def ties(choose: Callable[[Tensor], Any], position: int, other: Any) -> tuple[Tensor | None, Tensor]:
    """Where there are ties with indices that another engine chose, and where the indices differ."""
    model = Chooses(choose)
    result = model(VALUES)
    result = result if isinstance(result, Tensor) else result[position]
    mask = IndexTies(model, (VALUES,), {}).between(position, result, torch.tensor(other))
    return mask, result != torch.tensor(other)


# Which of equal values PyTorch chooses is not documented for all of these: two others each, one of which differs.
@pytest.mark.parametrize(
    ("choose", "position", "others"),
    [
        (lambda x: x.argmax(-1), 0, ([1, 3], [2, 3])),
        (lambda x: x.argmax(1, keepdim=True), 0, ([[1], [3]], [[2], [3]])),
        (lambda x: x.t().argmin(0), 0, ([3, 0], [3, 2])),
        (lambda x: x.argmax(-1).reshape(1, 2), 0, ([[1, 3]], [[2, 3]])),
        (lambda x: torch.full((2, 2), 4.0).to(x).argmax(), 0, (0, 3)),  # of all values
        (lambda x: x.max(1), 1, ([1, 3], [2, 3])),
        (lambda x: x.topk(2), 1, ([[2, 1], [3, 2]], [[1, 2], [3, 0]])),
        (lambda x: x.t().topk(2, 0), 1, ([[2, 3], [1, 1]], [[1, 3], [2, 0]])),
        (lambda x: torch.sort(x, stable=True), 1, ([[3, 0, 2, 1], [1, 2, 0, 3]], [[3, 0, 1, 2], [0, 1, 2, 3]])),
        (lambda x: x.argsort(-1), 0, ([[3, 0, 2, 1], [2, 0, 1, 3]], [[3, 0, 1, 2], [1, 2, 0, 3]])),
    ],
)
def test_ties(choose: Callable[[Tensor], Any], position: int, others: tuple[Any, Any]) -> None:
    found = [ties(choose, position, other) for other in others]
    for mask, differs in found:
        assert mask is not None
        assert torch.equal(mask, differs)
    assert any(bool(differs.any()) for _, differs in found)


def test_an_index_of_a_smaller_value() -> None:
    mask, differs = ties(lambda x: x.argmax(-1), 0, [0, 3])
    assert mask is not None
    assert differs.tolist() == [True, False]
    assert mask.tolist() == [False, False]


@pytest.mark.parametrize(
    ("choose", "position", "other"),
    [
        (lambda x: x.topk(2), 1, [[1, 1], [3, 0]]),  # one value twice
        (lambda x: x.argmax(-1), 0, [4, 3]),  # there is no fifth value
        (lambda x: x.argmax(-1), 0, [-1, 3]),
        (lambda x: x.argmax(-1) + 1, 0, [3, 4]),  # no indices any more
        (lambda x: x.argmax(-1).add_(1), 0, [3, 4]),
        (lambda x: (x > 4).long(), 0, [[0, 0, 1, 0], [0, 0, 0, 1]]),
    ],
)
def test_what_is_not_known_to_be_a_tie(choose: Callable[[Tensor], Any], position: int, other: Any) -> None:
    assert ties(choose, position, other)[0] is None


class Classifier(nn.Module):
    """Its classes come in pairs of equal scores, of which PyTorch and ONNX Runtime choose others."""

    def __init__(self, largest: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)
        self.largest = largest

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.layer(x).relu()
        _, indices = torch.cat([scores, scores], 1).topk(5, largest=self.largest)
        return scores, indices


@pytest.mark.parametrize("largest", [True, False])
def test_ties_between_engines_are_no_fault(largest: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared = prepare(Classifier(largest).eval(), QATConfig(reduce_range=True), (torch.randn(2, 8),))
    calibrate(prepared, [torch.randn(32, 8)])
    path = tmp_path / "model.onnx"
    export_onnx(prepared, (torch.randn(2, 8),), path)
    report = verify(prepared, [torch.randn(64, 8), torch.randn(64, 8)], path=path)
    result = report.layers[-1].exported
    assert result is not None
    assert result.ties > 0
    assert str(result) == f"0 of 640 ({result.ties} ties)"
    assert report.to_dict()["layers"][-1]["exported"]["ties"] == result.ties


def test_other_indices_are_a_fault(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared = prepare(Classifier().eval(), QATConfig(reduce_range=True), (torch.randn(2, 8),))
    calibrate(prepared, [torch.randn(32, 8)])
    path = tmp_path / "model.onnx"
    export_onnx(prepared, (torch.randn(2, 8),), path)
    other = prepare(Classifier(largest=False).eval(), QATConfig(reduce_range=True), (torch.randn(2, 8),))
    other.load_state_dict(prepared.state_dict())
    with pytest.raises(VerificationError):
        verify(other, [torch.randn(64, 8)], path=path)
