"""PNGs that can be read, of everything that is given."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from matplotlib import image
from torch import nn

from mlframework.quantization import QATConfig, QuantizationHistory, analyze_sensitivity, calibrate, plots, prepare


def prepared_model(inputs: torch.Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    prepared = prepare(model, QATConfig(weight_bits=4), (inputs,))
    calibrate(prepared, [inputs])
    return prepared


def test_every_figure_is_a_picture_with_something_in_it(tmp_path: Path) -> None:
    inputs = torch.randn(32, 8)
    prepared = prepared_model(inputs)
    history = QuantizationHistory(prepared)
    for _ in range(2):
        prepared(inputs)
        history.step()
    sensitivity = analyze_sensitivity(prepared, [inputs], bits=(8, 4))
    files = plots(prepared, [inputs], tmp_path / "figures", sensitivity=sensitivity, history=history, dpi=60)
    names = ["signal_to_noise", "tensors", "outputs", "sensitivity", "ranges", "oscillation"]
    assert files == [tmp_path / "figures" / f"{name}.png" for name in names]
    for path in files:
        picture = image.imread(path)
        assert min(picture.shape[:2]) > 60
        assert picture[..., :3].std() > 0.01


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(32, 8)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plots needs matplotlib.*mlframework-quantization\[analysis\]"):
        plots(prepared_model(inputs), [inputs], tmp_path)
    assert list(tmp_path.iterdir()) == []
