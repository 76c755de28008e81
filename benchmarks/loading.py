"""What loading a converted model takes in a fresh process, beside reading its file and building the float network.

Every figure is of a process of its own, which has imported the library before: processor time of one thread, which is
wall time on a quiet machine, as median of the processes.

    python benchmarks/loading.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results_file import environment, write_section
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlframework.quantization import QATConfig, calibrate, convert, load, prepare, save
from zoo import MobileNetV2, resnet20, resnet50

PROCESSES = 7
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20": (resnet20, 32),
    "MobileNetV2": (MobileNetV2, 64),
    "ResNet-50": (resnet50, 64),
}


def main() -> None:
    """Times them all and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=3, metavar=("NETWORK", "KIND", "PATH"), help="what a process of its own does")
    child = parser.parse_args().child
    torch.set_num_threads(1)
    if child is not None:
        print(json.dumps(_timed(*child)))
        return
    rows, imports = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, size) in NETWORKS.items():
            path = Path(folder) / f"{name}.safetensors"
            begin = time.process_time()
            _converted(make, size, path)
            made = time.process_time() - begin
            times: dict[str, list[float]] = {"file": [], "load": []}
            for _ in range(PROCESSES):
                for kind, found in times.items():
                    imported, elapsed = _in_a_process(name, kind, path)
                    imports.append(imported)
                    found.append(elapsed)
            plain, loaded = (statistics.median(found) for found in times.values())
            megabytes = path.stat().st_size / 1e6
            rows.append([name, f"{megabytes:.1f}", *(f"{1e3 * each:.0f}" for each in (plain, loaded, made))])
            rows[-1].insert(4, f"{loaded / plain:.2f}")
    lines = [
        "## Loading a file",
        "",
        "`python benchmarks/loading.py`: processor time in a fresh process, median of "
        f"{PROCESSES} each, one thread, milliseconds: to build the float network and read the file's bytes; to build "
        "it and `load` the file; and to prepare, calibrate with four pictures, convert and save, which loading saves. "
        f"Importing the library and PyTorch comes before, and takes {statistics.median(imports):.1f} s. "
        f"{environment()}",
        "",
        "| network | MB | build and read | build and load | ratio | make it anew |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "The aim is a ratio of 1.5. Loading makes every module anew and checks what the file says of it, however "
        "few weights there are; a small float network is built in less than that. A layer is packed when it is first "
        "called.",
    ]
    section = "\n".join(lines)
    print(section)
    write_section("loading", section)


def _converted(make: Callable[[], nn.Module], size: int, path: Path) -> None:
    images = torch.randn(4, 3, size, size)
    prepared = prepare(make(), QATConfig(), (images,))
    calibrate(prepared, [images])
    save(convert(prepared), path)


def _in_a_process(name: str, kind: str, path: Path) -> tuple[float, float]:
    command = [sys.executable, __file__, "--child", name, kind, str(path)]
    imported, elapsed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return imported, elapsed


def _timed(name: str, kind: str, path: str) -> tuple[float, float]:
    begin = time.process_time()  # of which importing is all so far
    network = NETWORKS[name][0]()
    if kind == "load":
        load(path, network)
    else:
        Path(path).read_bytes()
    return begin, time.process_time() - begin


if __name__ == "__main__":
    main()
