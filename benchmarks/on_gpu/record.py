"""Figures as JSON: a line to each as soon as it is measured, and one file with all of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

# How the facts begin that say what a network is.
WORKLOAD = "workload"


class Target(NamedTuple):
    """What a figure must reach: at most so much, or at least."""

    bound: float
    at_most: bool = True

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"


class Lines:
    """A file that several processes append records to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """One write, which the system does not mix with those of others."""
        line = json.dumps(record) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def read(self) -> list[dict[str, Any]]:
        """All that was appended, but for a line that a killed process has not finished."""
        records = []
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in text.splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records


class Recorder:
    """What a part has to say.

    Args:
        part: its name.
        lines: where its records go.
        folder: for files beside them.

    Attributes:
        has_failed: whether something did not run that had to.
    """

    def __init__(self, part: str, lines: Lines, folder: Path) -> None:
        self.part = part
        self.folder = folder
        self._lines = lines
        self._measured: set[str] = set()
        self.has_failed = False

    def figure(self, name: str, value: float, unit: str = "", target: Target | None = None) -> None:
        """A number; with a target, it stands in the short table. Measured again beside others, it is not repeated."""
        if name in self._measured:
            return
        self._measured.add(name)
        asked = None if target is None else target._asdict()
        self._lines.append(
            {"kind": "figure", "part": self.part, "name": name, "value": value, "unit": unit, "asked": asked}
        )

    def fact(self, name: str, value: object) -> None:
        """Something in words."""
        self._lines.append({"kind": "fact", "part": self.part, "name": name, "value": str(value)})

    def failure(self, name: str, error: BaseException, is_peer: bool = False) -> None:
        """Something that did not run, where the part goes on; a peer's is no failure of the part."""
        self.has_failed |= not is_peer
        text = f"{type(error).__name__}: {error}".splitlines()[0][:400]
        self._lines.append({"kind": "failure", "part": self.part, "name": name, "value": text})


def write_json(lines: Lines, path: Path) -> dict[str, Any]:
    """All records, by kind, in one file, which is there in full at any time."""
    records = lines.read()
    result: dict[str, Any] = {"facts": {}, "parts": [], "figures": [], "tests": [], "failures": []}
    for record in records:
        kind = record.pop("kind")
        if kind == "fact":
            result["facts"][record["name"]] = record["value"]
        else:
            result[f"{kind}s"].append(record)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    temporary.replace(path)
    return result
