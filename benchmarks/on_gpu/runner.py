"""Parts as processes with a limit each, and one for all of them: what fails or hangs does not stop the others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

POLL_SECONDS = 0.1


class Part(NamedTuple):
    """A process: its command, and the seconds that it may take."""

    name: str
    command: Sequence[str]
    seconds: float


class Outcome(NamedTuple):
    """How a part ended: "passed", "failed", "timed out" or "not started", and what it has printed."""

    name: str
    status: str
    seconds: float
    output: str


class Runner:
    """Runs groups of parts.

    Args:
        seconds: for all of them together, from now on.
        folder: where they run.
        logs: a folder for what they print.
        environment: the variables that they get.
    """

    def __init__(self, seconds: float, folder: Path, logs: Path, environment: Mapping[str, str]) -> None:
        self.deadline = time.monotonic() + seconds
        self.folder = folder
        self.logs = logs
        self.environment = dict(environment)

    def run(self, group: Sequence[Part], ended: Callable[[Outcome], None]) -> None:
        """Runs the parts of a group side by side; calls ``ended`` with the outcome of each."""
        running = []
        for part in group:
            if time.monotonic() >= self.deadline:
                ended(Outcome(part.name, "not started", 0.0, "no time was left\n"))
                continue
            running.append(_Process(part, self))
        while running:
            for process in list(running):
                outcome = process.outcome()
                if outcome is not None:
                    running.remove(process)
                    ended(outcome)
            time.sleep(POLL_SECONDS)


class _Process:
    def __init__(self, part: Part, runner: Runner) -> None:
        self.part = part
        self.log = runner.logs / f"{part.name}.txt"
        self.start = time.monotonic()
        self.deadline = min(self.start + part.seconds, runner.deadline)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                part.command,
                cwd=runner.folder,
                env=runner.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its own processes end with it
            )

    def outcome(self) -> Outcome | None:
        """None while it runs; ends it when its time is up."""
        code = self.process.poll()
        if code is None and time.monotonic() < self.deadline:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in a driver cannot be killed
            self.process.wait(timeout=5)
        status = "timed out" if code is None else "passed" if code == 0 else "failed"
        output = self.log.read_text(encoding="utf-8", errors="replace")
        return Outcome(self.part.name, status, round(time.monotonic() - self.start, 1), output)
