"""Determinism for every test; and at the end of a run, on what processor it was, and what was skipped there."""

from __future__ import annotations

import gc
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# Triton reads it when it is imported. Where there is no GPU, its interpreter runs the kernels for one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mlframework.quantization import kernels

# Where there are none, it warns once, which would be the error of whichever test comes first.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    kernels.active_path()

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")

_NEEDS_GPU = Path(__file__).with_name("gpu")

# On tensors this small, threads only wait for one another.
torch.set_num_threads(1)

# Where there are no such devices, each of these keeps a traceback to seed them by later, which takes a millisecond.
if not torch.cuda.is_available():
    for devices in (torch.cuda, torch.xpu, torch.mtia):
        devices.manual_seed_all = lambda seed: None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests that need a GPU are there where there is one, or for who names them."""
    is_named = any("gpu" in argument for argument in config.args)
    return True if collection_path == _NEEDS_GPU and not (is_named or torch.cuda.is_available()) else None


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look through it again and again."""
    gc.freeze()
    gc.set_threshold(10_000, 50, 50)  # a model is thousands of objects, which live as long as its test


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """A compiler that knows nothing of other tests, and that nothing of this one is left in; its counters start at
    zero."""
    from torch._dynamo.utils import counters  # the compiler takes long to import

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A machine runs the tests that its processor can run: says which instructions those had, and what was left out.

    A test that has others tested records each as its property ``instruction_set``.
    """
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in terminalreporter.getreports("skipped")
        if isinstance(report.longrepr, tuple)
    )
    terminalreporter.section(f"instruction set: {kernels.instruction_set()}; {sum(reasons.values())} skipped")
    others = {
        str(value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "instruction_set" and value != kernels.instruction_set()
    }
    if others:
        terminalreporter.write_line(f"and, in processes of their own: {', '.join(sorted(others))}")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")
