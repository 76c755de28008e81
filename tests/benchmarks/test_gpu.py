"""The program for the day that there is a GPU: rehearsed on a CPU, and what it does with parts that fail or hang."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.on_gpu.parts import NAMES, groups
from benchmarks.on_gpu.record import Lines, Recorder, Target, write_json
from benchmarks.on_gpu.report import section, table
from benchmarks.on_gpu.runner import Outcome, Part, Runner

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu.py"

# What takes seconds; and one of each kind, where what is left out differs in the network alone.
QUICK = ("build", "environment", "fake_quantize")
ONE_OF_EACH = (
    *QUICK,
    "models",
    "operators",
    "training",
    "resnet50_eager",
    "gpt_bytes_eager",
    "mlp_converted",
    "gpt_compiled",
)


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    return Lines(tmp_path / "gpu.jsonl")


def rehearsed(names: tuple[str, ...], folder: Path) -> tuple[dict[str, Any], str]:
    """What the parts write, and what the program prints."""
    environment = {**os.environ, "OUT": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), "--rehearse", "--parts", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + (folder / "gpu_log.txt").read_text()[-6000:]
    result: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    assert {part["name"]: part["status"] for part in result["parts"]} == dict.fromkeys(names, "passed")
    assert not [test for test in result["tests"] if test["outcome"] == "failed"]
    assert {test["part"] for test in result["tests"]} == {"operators", "models", "training"} & set(names)
    # torch.ao's fused operator takes float32 alone.
    assert all("torch.ao" in each["name"] for each in result["failures"]), result["failures"]
    return result, done.stdout


def asked_in(result: dict[str, Any]) -> set[str]:
    return {figure["name"] for figure in result["figures"] if figure["asked"] is not None}


@pytest.mark.slow
def test_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, printed = rehearsed(QUICK, tmp_path)
    assert {
        "learned, bfloat16: ours, of the copy's bandwidth",
        "fixed, float32: ATen / ours",
    } <= asked_in(result)
    assert printed.rstrip().endswith(table(result).rstrip())
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "--write", str(tmp_path / "gpu.json")])
    monkeypatch.syspath_prepend(PROGRAM.parent)
    with pytest.raises(ValueError, match="is a rehearsal's"):
        runpy.run_path(str(PROGRAM), run_name="__main__")


@pytest.mark.long
def test_rehearsal_of_one_of_each(tmp_path: Path) -> None:
    result, _ = rehearsed(ONE_OF_EACH, tmp_path)
    assert {
        "resnet50: ours / bfloat16, eager",
        "resnet50: ours / bfloat16, eager, saved for backward",
        "gpt_bytes: ours / bfloat16, eager, saved for backward",
        "gpt: ours / bfloat16, compiled",
        "mlp: ours, compiled, reduce-overhead / bfloat16, compiled, reduce-overhead",
    } <= asked_in(result)
    assert "resnet50, eager, ours" in (tmp_path / "gpu_profiles.txt").read_text()


def test_every_part_has_a_process_within_the_limit(tmp_path: Path) -> None:
    made = groups(NAMES, tmp_path / "lines", rehearses=False)
    assert [part.name for group in made for part in group] == NAMES
    assert all(0 < part.seconds <= 150 for group in made for part in group)


def test_what_fails_or_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    outcomes: dict[str, Outcome] = {}
    runner = Runner(60, tmp_path, tmp_path, os.environ)
    child = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    begin = time.monotonic()
    runner.run(
        [
            Part("hangs", [sys.executable, "-c", child], 1.0),
            Part("fails", [sys.executable, "-c", "print('words'); raise SystemExit(3)"], 30),
            Part("passes", [sys.executable, "-c", ""], 30),
        ],
        lambda outcome: outcomes.update({outcome.name: outcome}),
    )
    assert time.monotonic() - begin < 30
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "hangs": "timed out",
        "fails": "failed",
        "passes": "passed",
    }
    assert outcomes["fails"].output == "words\n"
    assert outcomes["hangs"].output in ("", "begun\n")


def test_nothing_outlasts_the_time_of_all(tmp_path: Path) -> None:
    outcomes: list[str] = []
    runner = Runner(0.5, tmp_path, tmp_path, os.environ)
    for name in ("first", "second"):
        runner.run([Part(name, ["sleep", "60"], 60)], lambda outcome: outcomes.append(outcome.status))
    assert outcomes == ["timed out", "not started"]


def test_a_target_is_a_bound_from_above_or_from_below() -> None:
    assert Target(1.05).is_met(1.05)
    assert not Target(1.05).is_met(1.06)
    assert Target(3, at_most=False).is_met(3.5)
    assert not Target(3, at_most=False).is_met(2.9)
    assert (str(Target(0.7)), str(Target(3, at_most=False))) == ("<= 0.7", ">= 3")


def test_records_come_together_but_for_one_that_was_cut_off(lines: Lines, tmp_path: Path) -> None:
    record = Recorder("steps", lines, tmp_path)
    record.figure("ratio", 0.9, target=Target(1.05))
    record.fact("card", "a card")
    record.failure("ours", RuntimeError("no\nkernel"))
    assert record.has_failed
    with lines.path.open("a") as file:
        file.write('{"kind": "figu')
    result = write_json(lines, tmp_path / "gpu.json")
    assert result == json.loads((tmp_path / "gpu.json").read_text())
    assert result["figures"] == [
        {"part": "steps", "name": "ratio", "value": 0.9, "unit": "", "asked": {"bound": 1.05, "at_most": True}}
    ]
    assert result["failures"][0]["value"] == "RuntimeError: no"


def test_the_reports_name_the_card_and_what_was_missed(lines: Lines, tmp_path: Path) -> None:
    record = Recorder("steps", lines, tmp_path)
    record.fact("card", "NVIDIA H200")
    record.figure("gpt: ours / bfloat16", 1.2, target=Target(1.05))
    record.figure("copy", 4300.0, "GB/s")
    record.failure("torch.ao", RuntimeError("float32 alone"), is_peer=True)
    assert not record.has_failed
    lines.append({"kind": "part", "name": "operators", "status": "failed", "seconds": 3.0})
    lines.append(
        {"kind": "test", "part": "operators", "name": "test_samples[add]", "outcome": "failed", "reason": "differs"}
    )
    for difference in (2e-6, 3e-6):
        lines.append(
            {"kind": "test", "part": "operators", "name": "t", "outcome": "passed", "measured": {"sums": difference}}
        )
    result = write_json(lines, tmp_path / "gpu.json")
    printed = table(result)
    assert "FAILED test_samples[add]: differs" in printed
    assert "gpt: ours / bfloat16  <= 1.05  1.2       NO" in printed.splitlines()
    written = section(result)
    assert written.startswith("## On a GPU: NVIDIA H200\n")
    assert "| gpt: ours / bfloat16 | <= 1.05 | 1.2 | no |" in written
    assert "| copy | 4300 GB/s |" in written
    assert "| torch.ao | RuntimeError: float32 alone |" in written
    assert "- tests of operators: 2 passed, 1 failed, 0 skipped\n  - sums: 3e-06\n" in written
