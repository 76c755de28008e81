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
    "resnet50_eager": Measurement("steps", "eager", "resnet50"),
    "gpt_eager": Measurement("steps", "eager", "gpt"),
    "gpt_bytes_eager": Measurement("steps", "eager", "gpt_bytes"),
    "resnet50_compiled": Measurement("steps", "compiled", "resnet50"),
    "gpt_compiled": Measurement("steps", "compiled", "gpt"),
    "mlp_converted": Measurement("inference", "run", "mlp"),
    "gpt_converted": Measurement("inference", "run", "gpt"),
    "resnet50_converted": Measurement("inference", "run", "resnet50"),
}
# What fills the compiler's caches for some of them.
AHEAD = {
    "resnet50_compiled_ahead": Measurement("steps", "compile_ahead", "resnet50"),
    "gpt_compiled_ahead": Measurement("steps", "compile_ahead", "gpt"),
    "resnet50_converted_ahead": Measurement("inference", "compile_ahead", "resnet50"),
    "gpt_converted_ahead": Measurement("inference", "compile_ahead", "gpt"),
}

# Parts of a group run side by side; what is timed runs alone, and what was asked for first comes first.
GROUPS: tuple[dict[str, float], ...] = (
    {BUILD: 60},
    {"environment": 40},
    {**dict.fromkeys(TESTS, 150), **dict.fromkeys(AHEAD, 150)},
    {"fake_quantize": 45},
    {"resnet50_eager": 50},
    {"gpt_eager": 60},
    {"gpt_bytes_eager": 50},
    {"mlp_converted": 60},
    {"gpt_converted": 75},
    {"resnet50_converted": 60},
    {"resnet50_compiled": 110},
    {"gpt_compiled": 110},
)
NAMES = [name for group in GROUPS for name in group]


def groups(chosen: Sequence[str], lines: Path, rehearses: bool) -> list[list[Part]]:
    """The chosen parts as processes, in their groups; in a rehearsal, where no time counts, two by two."""
    command = partial(_command, lines=lines, rehearses=rehearses)
    made = [[Part(name, command(name), seconds) for name, seconds in each.items() if name in chosen] for each in GROUPS]
    if not rehearses:
        return made
    parts = [part for group in made for part in group]
    return [parts[start : start + 2] for start in range(0, len(parts), 2)]


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
        options += ["-n", str(TESTS[name]), "--dist", "loadgroup"]
    return [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu" / f"test_{name}.py"), *options]


def measurement(name: str) -> Callable[..., None]:
    """The function of a part: takes a recorder, the device, and whether it is a rehearsal."""
    module, function, network = (MEASUREMENTS | AHEAD)[name]
    run: Callable[..., None] = getattr(importlib.import_module(f".{module}", __package__), function)
    return run if network is None else partial(run, network)
