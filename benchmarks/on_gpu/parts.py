"""What there is to run, in what order, and for how long at the most."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .runner import Part

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu.py"

# For everything; a machine is lent for fifteen minutes.
SECONDS = 480

BUILD = "build"
TESTS = {"operators": 6, "models": 4, "training": 4}  # and how many processes share the work of each


class Measurement(NamedTuple):
    """A part of ``gpu.py`` itself: the module of this package, its function, and the network that it is given."""

    module: str
    function: str
    network: str | None = None


MEASUREMENTS = {
    "environment": Measurement("environment", "run"),
    "fake_quantize": Measurement("fake_quantize", "run"),
    **{f"{network}_eager": Measurement("steps", "eager", network) for network in ("resnet50", "gpt", "gpt_bytes")},
    **{f"{network}_compiled": Measurement("steps", "compiled", network) for network in ("resnet50", "gpt")},
    **{f"{network}_ahead": Measurement("steps", "compile_ahead", network) for network in ("resnet50", "gpt")},
    **{f"{network}_converted": Measurement("inference", "run", network) for network in ("mlp", "gpt", "resnet50")},
}

# Parts of a group run side by side; what is timed runs alone. The compiled steps come late; early in the run, beside the
# tests, the caches of the compiler are filled for them.
GROUPS: tuple[dict[str, float], ...] = (
    {BUILD: 60},
    {"environment": 40},
    {"operators": 150, "models": 150, "training": 150, "resnet50_ahead": 150, "gpt_ahead": 150},
    {"fake_quantize": 45},
    {"resnet50_eager": 50},
    {"gpt_eager": 50},
    {"mlp_converted": 40},
    {"gpt_converted": 60},
    {"resnet50_converted": 60},
    {"resnet50_compiled": 80},
    {"gpt_compiled": 80},
    {"gpt_bytes_eager": 40},
)
NAMES = [name for group in GROUPS for name in group]


def groups(chosen: Sequence[str], lines: Path, rehearses: bool) -> list[list[Part]]:
    """The chosen parts as processes, in their groups."""
    command = partial(_command, lines=lines, rehearses=rehearses)
    return [[Part(name, command(name), seconds) for name, seconds in each.items() if name in chosen] for each in GROUPS]


def _command(name: str, lines: Path, rehearses: bool) -> list[str]:
    if name == BUILD:
        return [
            sys.executable,
            "setup.py",
            "--version" if rehearses else "build_ext",
            *([] if rehearses else ["--inplace"]),
        ]
    if name in TESTS:
        return _tests(name, lines, rehearses)
    command = [sys.executable, str(PROGRAM), "--measure", name, "--lines", str(lines)]
    return [*command, "--rehearse"] if rehearses else command


def _tests(name: str, lines: Path, rehearses: bool) -> list[str]:
    # (pytest-benchmark, where it is installed, warns of pytest-xdist before any test, and warnings are errors.)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", f"--gpu-lines={lines}"]
    if rehearses:
        options.append("--gpu-device=cpu")
    elif importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(TESTS[name]), "--dist", "load"]
    return [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu" / f"test_{name}.py"), *options]


def measurement(name: str) -> Callable[..., None]:
    """The function of a part: takes a recorder, the device, and whether it is a rehearsal."""
    module, function, network = MEASUREMENTS[name]
    run: Callable[..., None] = getattr(importlib.import_module(f".{module}", __package__), function)
    return run if network is None else partial(run, network)
