"""The study resumes, and what it records of a run is so."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.pretrained import SIGNAL_TO_NOISE, execution, fingerprints, runs, study, summary
from benchmarks.pretrained.best import best_of
from benchmarks.pretrained.methods import OURS, Method, Width
from benchmarks.pretrained.recipes import RECIPES
from benchmarks.pretrained.runs import Result, Run
from mlframework.quantization import QATConfig, prepare

needs_pnet = pytest.mark.skipif(
    find_spec("facenet_pytorch") is None or find_spec("skimage") is None,
    reason="facenet_pytorch or scikit-image is not installed",
)


class Inline:
    """Stands for a pool of processes, and runs in this one."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def submit(self, function: Any, *arguments: Any) -> Inline:
        self.value = function(*arguments)
        return self

    def result(self) -> Any:
        return self.value

    def shutdown(self, **options: Any) -> None:
        pass


def test_an_interrupted_study_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, executed = tmp_path / "results.jsonl", []

    def execute(run: Run, *_: Any) -> Result:
        if len(executed) == 3:
            executed.append(None)
            raise KeyboardInterrupt
        executed.append(run)
        return Result(run, OURS, {"accuracy": 0.5, SIGNAL_TO_NOISE: math.inf})

    monkeypatch.setattr(execution, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(execution, "execute", execute)
    monkeypatch.setattr(execution, "append", lambda result: runs.append(result, path))
    every = list(execution.planned(["digits"], ["W8A8"], ["minmax", "recommended recipe"], seeds=2))
    console = Console(quiet=True)
    with pytest.raises(KeyboardInterrupt):
        execution.execute_all(every, 1, console)
    assert list(runs.read(path)) == every[:3]
    with path.open("a") as file:
        file.write('{"run": {"network": "dig')  # the line that it was writing
    left = [run for run in every if run not in runs.read(path)]
    assert left == every[3:]
    execution.execute_all(left, 1, console)
    assert set(runs.read(path)) == set(every)
    assert executed == [*every[:3], None, *every[3:]]


def test_a_later_result_replaces_an_earlier_one(tmp_path: Path) -> None:
    path, run = tmp_path / "results.jsonl", Run("pnet", "W8A8", "minmax", 0, 0)
    for score in (0.1, 0.2):
        runs.append(Result(run, OURS, {"F1 of face cells": score, SIGNAL_TO_NOISE: 1.0}), path)
    assert runs.read(path)[run].metrics["F1 of face cells"] == 0.2


def test_the_share_in_integers_counts_what_the_configuration_skips() -> None:
    model = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 4), nn.Linear(4, 8))
    prepared = prepare(model, QATConfig(skip=("1",)), (torch.randn(2, 4),))
    assert runs.integer_share(prepared) == (4 * 12 + 4 * 8) / (4 * 12 + 12 * 4 + 4 * 8)


def test_what_is_planned() -> None:
    planned = list(
        execution.planned(["pnet", "digits"], ["W8A8", "W2A2"], ["minmax", "recommended recipe"], budget_seconds=7)
    )
    # Float, minmax and training: of pnet at one width, of digits at two, of which only W2A2 is trained at.
    assert len(planned) == len(set(planned)) == (1 + 1 + 3) + (5 + 2 * 5 + 5)
    assert {run.seconds for run in planned if run.method == "recommended recipe"} == {7}
    assert {run.seconds for run in planned if run.method != "recommended recipe"} == {0}


def test_a_result_lasts_as_long_as_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    run, method = Run("digits", "W8A8", "minmax", 0, 0), RECIPES["minmax"]
    code = fingerprints.fingerprint("digits", method)
    assert execution.is_current(run, {run: Result(run, OURS, code=code)})
    assert execution.is_current(run, {run: Result(run, OURS, code=code, failure="no", is_unsupported=True)})
    assert not execution.is_current(run, {run: Result(run, OURS, code=code, failure="out of memory")})
    assert not execution.is_current(run, {run: Result(run, OURS, code="another")})
    assert not execution.is_current(run, {})
    # What a result rests on is its network, its method, and the library.
    assert fingerprints.fingerprint("pnet", method) != code
    assert fingerprints.fingerprint("digits", None) != code
    monkeypatch.setattr(fingerprints, "_library", lambda: "another library")
    assert fingerprints.fingerprint("digits", method) != code


def test_a_network_rests_on_the_modules_that_it_imports() -> None:
    folder = Path(fingerprints.__file__).parent
    assert {path.name for path in fingerprints.with_imported(folder / "efficientnet.py")} == {
        "efficientnet.py",
        "metrics.py",
        "pictures.py",
        "protocol.py",
    }
    peer = {path.relative_to(folder) for path in fingerprints.with_imported(folder / "peers" / "pt2e.py")}
    denoiser = {path.name for path in fingerprints.with_imported(folder / "denoiser.py")}
    assert {"float_training.py", "mobilenet_v2.py"} <= denoiser
    assert {Path("peers/pt2e.py"), Path("methods.py"), Path("training.py"), Path("protocol.py")} <= peer


def test_rows_give_mean_and_spread() -> None:
    results = [
        Result(Run("digits", "W4A4", "recommended recipe", seed, 20), OURS, {"accuracy": value, SIGNAL_TO_NOISE: 10.0})
        for seed, value in enumerate((0.97, 0.98, 0.99))
    ]
    failed = Result(Run("digits", "W4A4", "other", 0, 0), "other 1.0", failure="it cannot")
    rows = list(summary.rows([*results, failed]))
    assert rows[0].figures == ("0.9800 ± 0.0100", "10.0000")
    assert rows[1].figures == ()
    assert rows[1].remarks == "no figure: it cannot"


def test_the_best_of_either_side() -> None:
    def row(width: str, package: str, method: str, *means: float) -> summary.Row:
        return summary.Row("pnet", width, method, package, means, (), "", 1)

    found = best_of(
        [
            row("float", "float", "float", 1.0, math.inf),
            row("W8A8", f"{OURS} 1.0", "a", 0.90, 20.0),
            row("W8A8", f"{OURS} 1.0", "b", 0.899, 21.0),
            row("W8A8", "other 2", "c", 0.902, 25.0),
            row("W8A8", "other 2", "failed"),
            row("W4A8", f"{OURS} 1.0", "a", 0.5, 5.0),
            row("W4A8", "other 2", "c", 0.6, 4.0),
            row("W4A4", f"{OURS} 1.0", "a", 0.1, 5.0),
        ]
    )
    assert [(best.row.width, best.row.method, best.is_ours, best.wins) for best in found] == [
        ("W8A8", "b", True, True),  # the higher signal-to-noise ratio; and a tie with the other side
        ("W8A8", "c", False, True),
        ("W4A8", "a", True, False),
        ("W4A8", "c", False, True),
        ("W4A4", "a", True, False),
    ]


@needs_pnet
def test_the_float_network_agrees_with_itself() -> None:
    network = study("pnet")
    assert network.evaluate(network.model()) == {"F1 of face cells": 1.0, SIGNAL_TO_NOISE: math.inf}


@needs_pnet
def test_a_run_of_this_library_is_exact() -> None:
    result = runs.execute(Run("pnet", "W8A8", "minmax", 0, 0), Width(8, 8), RECIPES["minmax"])
    assert result.exact
    assert result.integer_share == 1
    assert 0.5 < result.metrics["F1 of face cells"] < 1


@needs_pnet
def test_a_peer_that_fails_is_recorded() -> None:
    def fails(task: Any) -> Any:
        raise RuntimeError("no such layer\nand more")

    result = runs.execute(Run("pnet", "W8A8", "x", 0, 0), Width(8, 8), Method("x", fails))
    assert result.failure == "RuntimeError: no such layer"
    assert not result.metrics


@needs_pnet
@pytest.mark.long
def test_training_within_a_budget_brings_the_network_nearer() -> None:
    network = study("pnet")
    method = RECIPES["recommended recipe"]
    before = runs.execute(Run("pnet", "W4A8", "minmax", 0, 0), Width(4, 8), RECIPES["minmax"])
    after = runs.execute(Run("pnet", "W4A8", "recommended recipe", 0, 3), Width(4, 8), method)
    assert after.notes["steps"] > 5
    assert after.metrics[SIGNAL_TO_NOISE] > before.metrics[SIGNAL_TO_NOISE]
    assert torch.equal(*(network.model().conv1.weight for _ in range(2)))  # the float network is as it was
