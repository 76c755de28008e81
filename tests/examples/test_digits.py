"""The digits demo: what it measures, what it writes, and what an interruption leaves behind."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = {"float.safetensors", "int8.safetensors", "summary.json", "training.png"}

pytestmark = pytest.mark.slow


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The demo's module, with a float training that is short."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("digits")
    monkeypatch.setattr(module, "FLOAT_EPOCHS", 2)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="8 bits"),
        pytest.param(["--bits", "4", "--learnable"], id="4 bits learnable", marks=pytest.mark.long),
    ],
)
def test_the_whole_run(digits: ModuleType, options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert digits.main([*options, "--epochs", "1", "--seed", "3", "--output", str(folder)]) == 0
    assert {file.name for file in folder.iterdir()} == FILES
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["mismatched_codes"] == summary["mismatched_logits"] == summary["reloaded_mismatched_logits"] == 0
    assert summary["compared_codes"] > 1_000_000
    for name in ("float_accuracy", "ptq_accuracy", "qat_accuracy", "int8_accuracy"):
        assert 80 < summary[name] <= 100
    for name in ("float", "int8"):
        assert summary[f"{name}_bytes"] == (folder / f"{name}.safetensors").stat().st_size
    assert summary["int8_bytes"] < 0.5 * summary["float_bytes"]
    assert summary["seed"] == 3


def test_a_seed_gives_the_same_model(digits: ModuleType) -> None:
    monitor = digits.TrainingMonitor(digits.Console(quiet=True))
    first, second = (digits.train_float(digits.load_data(1), 1, monitor).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def interrupt_while_writing(figure: Any, file: Path, **options: Any) -> None:
    file.write_bytes(b"\x89PNG, but only the beginning")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "interruption", "said", "complete"),
    [
        ("digits.F.cross_entropy", interrupt, "float training; 0 of 2 epochs done; complete", []),
        ("digits.calibrate", interrupt, "post-training quantization; last test accuracy", ["float.safetensors"]),
        ("digits.parameter_groups", interrupt, "QAT; 0 of 1 epochs done; complete", ["float.safetensors"]),
        (
            "digits_report.Figure.savefig",
            interrupt_while_writing,
            "report; last test accuracy",
            ["float.safetensors", "int8.safetensors"],
        ),
    ],
)
def test_an_interruption_leaves_complete_files_only(
    digits: ModuleType,
    place: str,
    interruption: Callable[..., None],
    said: str,
    complete: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(place, interruption)
    assert digits.main(["--epochs", "1", "--output", str(tmp_path)]) == 130
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"Interrupted in: {said}")
    assert line.endswith(", ".join(complete) or "no file yet")
    assert sorted(file.name for file in tmp_path.iterdir()) == complete


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "9"], "expected a whole number from 2 to 8, got '9'"),
        (["--epochs", "many"], "expected a whole number from 1, got 'many'"),
        (["--output", __file__], "cannot make the folder"),
    ],
)
def test_bad_options_are_explained(
    digits: ModuleType, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        digits.main(arguments)
    assert said in capsys.readouterr().err
