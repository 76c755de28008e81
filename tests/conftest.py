"""Determinism for every test; and at the end of a run, on what processor it was, and what was skipped there."""

from __future__ import annotations

import os
import warnings
from collections import Counter

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

# On tensors this small, threads only wait for one another.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
