"""The demos in trainers: short runs of all that they do."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the trainers' own


@pytest.mark.parametrize(("name", "epochs", "at_least"), [("lightning_digits", 2, 80), ("transformers_digits", 6, 50)])
def test_a_demo_ends_in_integers_and_a_file(
    name: str,
    epochs: int,
    at_least: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        demo = importlib.import_module(name)
    arguments = ["--float-epochs", str(epochs), "--epochs", "1", "--output", str(tmp_path)]
    assert demo.main(arguments) == 0
    torch.set_num_threads(threads)
    assert (tmp_path / "digits.onnx").stat().st_size > 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("int8: ")]
    assert float(line.split()[1]) > at_least
    assert "agree code for code" in line
