"""Everything that is to be checked and measured on a machine with a GPU, in eight minutes: ``make gpu``.

It takes torch for CUDA with its Triton, pytest, transformers and NumPy, and builds the compiled kernels of the CPU
where there is a compiler. Each part is a process of its own with a limit; one that fails does not stop the others.
Records are written as they come (``gpu.jsonl``), then put together (``gpu.json``), with what all parts printed and the
profiles of training steps beside them, into ``$OUT``, or ``out/`` where that is not set. A short table comes last.

    python benchmarks/gpu.py [--parts operators fake_quantize] [--seconds 480]
    python benchmarks/gpu.py --rehearse           # all of it on a CPU, tiny
    python benchmarks/gpu.py --write out/gpu.json # writes its section of RESULTS.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from on_gpu import parts
from on_gpu.record import Lines, Recorder, write_json
from on_gpu.report import section, table
from on_gpu.runner import Outcome, Runner

ROOT = parts.ROOT
LOOKING_SECONDS = 60


def run(chosen: list[str], seconds: float, rehearses: bool) -> int:
    """Runs the chosen parts; the exit code is that of a test run."""
    folder = Path(os.environ.get("OUT") or ROOT / "out").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.jsonl", "gpu.json", "gpu_log.txt", "gpu_profiles.txt"):
        (folder / name).unlink(missing_ok=True)
    lines = Lines(folder / "gpu.jsonl")
    lines.append({"kind": "fact", "part": "all", "name": "rehearsal", "value": str(rehearses)})
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each of several processes
    statuses = []

    def ended(outcome: Outcome) -> None:
        statuses.append(outcome.status)
        lines.append({"kind": "part", **{key: outcome._asdict()[key] for key in ("name", "status", "seconds")}})
        with (folder / "gpu_log.txt").open("a", encoding="utf-8") as log:
            log.write(f"==== {outcome.name}: {outcome.status} after {outcome.seconds} s\n{outcome.output}\n")
        write_json(lines, folder / "gpu.json")
        print(f"{outcome.name}: {outcome.status} after {outcome.seconds:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as logs:
        runner = Runner(seconds, ROOT, Path(logs), environment)
        for group in parts.groups(chosen, lines.path, rehearses):
            runner.run(group, ended)
    print(f"\n{table(write_json(lines, folder / 'gpu.json'))}")
    return int(any(status != "passed" for status in statuses))


def has_gpu() -> bool:
    """Whether PyTorch finds one; asked in another process, since a driver may hang."""
    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    try:
        return subprocess.run([sys.executable, "-c", program], timeout=LOOKING_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def measure(name: str, lines: Path, rehearses: bool) -> int:
    """One part, in this process; the exit code says whether all of it ran that had to."""
    import torch

    device = torch.device("cpu" if rehearses else "cuda")
    if rehearses:
        torch.set_num_threads(1)
    record = Recorder(name, Lines(lines), lines.parent)
    parts.measurement(name)(record, device, rehearses)
    return int(record.has_failed)


def write(path: Path) -> None:
    """The section of RESULTS.md from the file of a run.

    Raises:
        ValueError: it is that of a rehearsal.
    """
    from results_file import write_section

    result = json.loads(path.read_text(encoding="utf-8"))
    if result["facts"].get("rehearsal") != "False":
        raise ValueError(f"{path} must come from a GPU, and is a rehearsal's")
    write_section("gpu", section(result))


def main() -> int:
    """Runs, measures or writes, as asked."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=parts.NAMES, default=parts.NAMES)
    parser.add_argument("--seconds", type=float, default=parts.SECONDS)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--measure", choices=parts.NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write is not None:
        write(arguments.write)
        return 0
    if arguments.measure is not None:
        return measure(arguments.measure, arguments.lines, arguments.rehearse)
    if not (arguments.rehearse or has_gpu()):
        print("There is no GPU here that PyTorch can use. (--rehearse runs everything on the CPU, tiny.)")
        return 2
    return run(arguments.parts, arguments.seconds - (time.monotonic() - begin), arguments.rehearse)


if __name__ == "__main__":
    sys.exit(main())
