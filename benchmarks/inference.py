"""Converted models at work, in PyTorch, and as the exported file in ONNX Runtime and OpenVINO.

Against each engine's own quantizer and torch.ao's converted model.

    pip install -e ".[bench]"
    python benchmarks/inference.py
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import nncf
import onnxruntime
import openvino
import torch
from results_file import environment, write_section
from rich.console import Console
from timing import Timing, time_in_turns
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peers

import zoo
from mlframework.quantization import QATConfig, calibrate, convert, export_onnx, prepare

THREADS = 2
BATCHES = {"resnet20": (1, 64), "resnet18_cifar": (1, 16), "mobilenet_v2": (1,)}

OURS = "PyTorch int8"
OURS_ONNX = "ONNX Runtime, our file"
ORT = "ONNX Runtime, its quantizer"
OURS_OPENVINO = "OpenVINO, our file"
OPENVINO = "OpenVINO, NNCF"
TORCH_AO = "torch.ao int8"


def contenders(name: str, batch: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Everything that runs one network at one batch size."""
    network = zoo.FULL_SIZE[name]
    model = network.make()
    zoo.roughen_batch_norms(model, seed=0)
    model.eval()
    (x,) = network.example_inputs(batch)
    batches = [network.example_inputs(8, seed)[0] for seed in range(1, 5)]
    folder.mkdir()
    converted, file = ours(model, "onnxruntime", batches, folder)
    _, openvino_file = ours(model, "openvino", batches, folder)
    float_file = peers.float_file(model, batches[0], folder / "float.onnx")
    channels_last = x.contiguous(memory_format=torch.channels_last)
    float_model = model.to(memory_format=torch.channels_last)
    return {
        "PyTorch float32": lambda: float_model(channels_last),
        OURS: lambda: converted(x),
        TORCH_AO: peers.torch_ao(model, batches, x),
        "ONNX Runtime float32": peers.onnxruntime_call(float_file, x, THREADS),
        OURS_ONNX: peers.onnxruntime_call(file, x, THREADS),
        ORT: peers.onnxruntime_call(peers.onnxruntime_quantized(float_file, batches, folder / "ort.onnx"), x, THREADS),
        "OpenVINO float32": peers.openvino_call(float_file, x, THREADS),
        OURS_OPENVINO: peers.openvino_call(openvino_file, x, THREADS),
        OPENVINO: peers.openvino_call(peers.nncf_quantized(float_file, batches), x, THREADS),
    }


def ours(model: nn.Module, target: str, batches: list[torch.Tensor], folder: Path) -> tuple[nn.Module, Path]:
    """The converted model, and its file for one engine."""
    prepared = prepare(model, QATConfig.for_target(target), (batches[0],))
    calibrate(prepared, batches)
    converted = convert(prepared)
    path = folder / f"{target}.onnx"
    export_onnx(converted, (batches[0],), path, target=target)
    return converted, path


def main() -> None:
    torch.set_num_threads(THREADS)
    console = Console()
    versions = f"ONNX Runtime {onnxruntime.__version__}, OpenVINO {openvino.__version__}, NNCF {nncf.__version__}."
    lines = [
        "## Inference",
        "",
        "`python benchmarks/inference.py`: milliseconds a call, medians of blocks of calls taken in turn. ResNet-20",
        "and ResNet-18 on 32x32 images, MobileNetV2 on 224x224; every contender was calibrated on the same batches.",
        f"{environment()} {versions}",
        "",
    ]
    names: list[str] = []
    results: dict[tuple[str, int], dict[str, Timing]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, sizes in BATCHES.items():
            for batch in sizes:
                console.print(f"{name}, batch {batch}")
                with torch.inference_mode(False), torch.no_grad():
                    calls = contenders(name, batch, Path(folder) / f"{name}-{batch}")
                results[name, batch] = time_in_turns(calls)
                names = list(calls)
                for contender, timing in results[name, batch].items():
                    console.print(f"  {contender:30} {timing.median:8.3f} ms")
    columns = [f"{name}, batch {batch}" for name, batch in results]
    lines += [f"| ms (median) | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for contender in names:
        lines.append(
            f"| {contender} | " + " | ".join(f"{timings[contender].median:.3g}" for timings in results.values()) + " |"
        )
    for title, one, other in (
        (f"{OURS} / {ORT}", OURS, ORT),
        (f"{OURS} / {TORCH_AO}", OURS, TORCH_AO),
        (f"{OURS_ONNX} / its quantizer's", OURS_ONNX, ORT),
        (f"{OURS_OPENVINO} / NNCF's", OURS_OPENVINO, OPENVINO),
    ):
        ratios = (timings[one].median / timings[other].median for timings in results.values())
        lines.append(f"| **{title}** | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    write_section("inference", "\n".join(lines))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of the peers' dependencies
    main()
