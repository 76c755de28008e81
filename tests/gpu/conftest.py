"""The device that these tests are for, and what becomes of their results.

Without a GPU they are skipped. ``--gpu-device cpu`` rehearses them: on tensors of the CPU, the first case of each test
(and operator), tiny.
``benchmarks/gpu.py`` runs them on the day that there is a GPU; options are known where this folder is named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from mlframework.quantization import kernels
from mlframework.quantization.kernels.triton_gpu.availability import is_interpreter


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.addoption("--gpu-lines", type=Path, help="a file to append each result to, as a line of JSON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in own:
        item.add_marker(pytest.mark.gpu)
        if config.pluginmanager.has_plugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(_arguments(item).get("name", item.nodeid)))  # one process a network
        item.add_marker(pytest.mark.filterwarnings("default"))  # nobody has seen yet what PyTorch warns of there
    if config.getoption("--gpu-device", "cuda") == "cpu":
        kept, seen = [], set()
        for item in own:
            kind = (item.path, getattr(item, "originalname", item.name), _arguments(item).get("operator"))
            if kind not in seen:
                kept.append(item)
            seen.add(kind)
        config.hook.pytest_deselected(items=[item for item in own if item not in kept])
        items[:] = kept
    elif not torch.cuda.is_available():
        for item in own:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _arguments(item: pytest.Item) -> dict[str, object]:
    """What a test is parametrized with."""
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


@pytest.fixture(scope="session")
def rehearses(pytestconfig: pytest.Config) -> bool:
    """Whether there is no GPU, and everything is tiny."""
    return pytestconfig.getoption("--gpu-device", "cuda") == "cpu"


@pytest.fixture(scope="session")
def device(rehearses: bool) -> torch.device:
    """A GPU; the CPU in a rehearsal."""
    return torch.device("cpu") if rehearses else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def _kernels(rehearses: bool) -> Iterator[None]:
    """The kernels for GPUs; in a rehearsal they run in Triton's interpreter, where there is one."""
    with ExitStack() as stack:
        if rehearses and is_interpreter():
            stack.enter_context(kernels.interpreted_kernels())
        yield


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Once for every test, in the process that has started the others."""
    path = _Lines.path
    if path is None or not (report.when == "call" or (report.when == "setup" and not report.passed)):
        return
    reason = "" if report.passed else str(getattr(report.longrepr, "reprcrash", report.longrepr))[-600:]
    record = {
        "kind": "test",
        "part": Path(report.location[0]).stem.removeprefix("test_"),
        "name": report.nodeid.rpartition("/")[2],
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "reason": reason,
        "measured": dict(report.user_properties),
    }
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(record) + "\n").encode())
    finally:
        os.close(descriptor)


class _Lines:
    path: Path | None = None


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        _Lines.path = config.getoption("--gpu-lines", None)
