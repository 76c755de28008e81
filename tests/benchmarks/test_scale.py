"""The cost model of training on many ranks. (What ranks really send is in tests/integration/test_data_parallel.py.)"""

from __future__ import annotations

from pathlib import Path

import torch

import zoo
from benchmarks.scale import size_of, size_of_large, tables
from mlframework.quantization import QATConfig, prepare


def test_counts_without_values_are_those_of_a_prepared_model() -> None:
    gpt = zoo.GPT(8, 4, width=8, layers=1, heads=2)
    resnet = zoo.resnet20(width=4)
    for model, inputs in ((gpt, torch.zeros(1, 4, dtype=torch.long)), (resnet, torch.randn(1, 3, 16, 16))):
        size = size_of(prepare(model, QATConfig(), (inputs,)))
        assert size == size_of_large(model, size.activations, size.affine)


def test_the_documents_tables_are_those_computed() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert "\n".join(tables()).strip() in document
