"""Each benchmark writes its own section of RESULTS.md, and leaves the others as they are."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def environment() -> str:
    """What the figures were measured on, in a line."""
    threads = torch.get_num_threads()
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()} "
        f"({torch.backends.cpu.get_cpu_capability()}), {threads} thread{'s' if threads > 1 else ''}."
    )


def read_section(name: str) -> str:
    """What stands between the markers of that name; empty where there are none."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    return text.split(begin)[1].split(end)[0] if begin in text else ""


def write_section(name: str, section: str) -> None:
    """Puts the section between the markers of that name, at the end of the file where there are none yet."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Measured results\n"
    if begin not in text or end not in text:
        text = f"{text.rstrip()}\n\n{begin}\n{end}\n"
    before, after = text.split(begin)[0], text.split(end)[1]
    temporary = RESULTS.with_suffix(".partial")
    temporary.write_text(f"{before}{begin}\n{section}\n{end}{after}", encoding="utf-8")
    temporary.replace(RESULTS)
