"""Single runs of the study, and the file that keeps their results."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.utils import _pytree as pytree

from mlframework.quantization import convert, preparation_report
from mlframework.quantization.kernels import instruction_set
from mlframework.quantization.preparation.report import SKIPPED

from . import study
from .fingerprints import fingerprint
from .methods import OURS, Method, Task, Unsupported, Width
from .protocol import Study

RESULTS = Path(__file__).with_name("results.jsonl")  # kept with the code: hours of processor time
FLOAT = "float"


@dataclass(frozen=True)
class Run:
    """What identifies a result: run twice with the same fields, the same is measured.

    Attributes:
        network: a key of ``STUDIES``.
        width: such as ``"W8A8"``, or ``"float"``.
        method: a key of ``METHODS``, or ``"float"``.
        seed: of the training, and of the split where there is one for each.
        seconds: the budget of processor time; 0 of what does not train.
        kind: of the processor, by its instruction set.
    """

    network: str
    width: str
    method: str
    seed: int
    seconds: float
    kind: str = field(default_factory=instruction_set)

    def __str__(self) -> str:
        return f"{self.network} {self.width} {self.method}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What came out of a run.

    Attributes:
        run: which.
        package: a name and its version.
        metrics: of the study; empty after a failure.
        notes: what else the method recorded.
        wall_seconds: to quantize, without the evaluation.
        exact: whether converted outputs equal prepared ones; None for other libraries.
        integer_share: of the multiply-adds, between 0 and 1; None for other libraries.
        failure: why there are no metrics.
        is_unsupported: whether it failed because the library does not offer what was asked for.
        code: what was run (:func:`.fingerprint`).
    """

    run: Run
    package: str
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    wall_seconds: float = 0.0
    exact: bool | None = None
    integer_share: float | None = None
    failure: str | None = None
    is_unsupported: bool = False
    code: str = ""

    def is_final(self, code: str) -> bool:
        """Whether it need not be run again: it was this code, and if it failed, not by an accident."""
        return self.code == code and (self.failure is None or self.is_unsupported)


@cache
def _study(name: str, seed: int) -> Study:
    return study(name, seed)


def execute(run: Run, width: Width | None, method: Method | None, threads: int = 1) -> Result:
    """Quantizes and evaluates; a method that fails makes a result that says why.

    Args:
        run: which.
        width: its bits; None for the float network.
        method: None for the float network.
        threads: of PyTorch.
    """
    torch.set_num_threads(threads)
    network = _study(run.network, run.seed)
    code = fingerprint(run.network, method)
    if width is None or method is None:
        return Result(run, FLOAT, network.evaluate(network.model()), code=code)
    library = f"{method.package} {method.version}"
    task = Task(network, width, run.seed, run.seconds)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            if method.package != OURS:
                warnings.simplefilter("ignore")
            model = method.quantize(task)
            seconds = time.perf_counter() - started
            metrics = network.evaluate(model)
    except Unsupported as error:
        return Result(run, library, failure=str(error), is_unsupported=True, code=code)
    except Exception as error:  # a library may fail in any way, and the study goes on
        if method.package == OURS:
            raise
        reason = str(error).strip().splitlines() or [""]
        return Result(run, library, failure=f"{type(error).__name__}: {reason[0][:200]}", code=code)
    exact = share = None
    if method.package == OURS:
        assert isinstance(model, nn.Module)
        exact, share = converts_exactly(model, network), integer_share(model)
    return Result(run, library, metrics, task.notes, seconds, exact, share, code=code)


def integer_share(prepared: nn.Module) -> float:
    """Of all multiply-adds; the report's own share does not count what a configuration leaves float."""
    report = preparation_report(prepared)
    left_out = sum(entry.multiply_adds for entry in report.left_float if entry.detail.startswith(SKIPPED))
    return report.multiply_adds.quantized / (report.multiply_adds.total + left_out)


def converts_exactly(prepared: nn.Module, network: Study) -> bool:
    """Whether converted and prepared model give the same bits on the first test batch."""
    converted, inputs = convert(prepared).eval(), network.test_batches()[0].inputs
    with torch.no_grad():
        pair = (pytree.tree_leaves(model(*inputs)) for model in (prepared, converted))
        return all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


def read(path: Path = RESULTS) -> dict[Run, Result]:
    """What a file holds; of a run that is in it twice the later one, and nothing of a line that was cut short."""
    return {result.run: result for result in _results(path)}


def _results(path: Path) -> Iterator[Result]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            continue  # the study was interrupted while it wrote
        yield Result(**{**fields, "run": Run(**fields["run"])})


def append(result: Result, path: Path = RESULTS) -> None:
    """Adds a line."""
    path.parent.mkdir(exist_ok=True)
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(asdict(result)) + "\n")
