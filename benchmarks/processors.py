"""What each kind of processor makes of it: inference beside ONNX Runtime, training steps, compiled ones, the operator.

    python benchmarks/processors.py [--parts inference training compiled operator] [--rounds 5]

Each kind has a column of its own in the table; a run renews the column of the processor that it is on. The other
libraries' figures are in the sections of ``inference.py`` and ``training_step.py``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from columns import ColumnsByKind
from rich.console import Console
from timing import time_in_turns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peers
from qat_peers import EAGER, FLOAT
from training_step import measure
from workloads import WORKLOADS

import zoo
from mlframework.quantization import (
    QATConfig,
    QuantizationParameters,
    QuantizationScheme,
    calibrate,
    convert,
    fake_quantize,
    prepare,
)

THREADS = 2
BATCHES = {"resnet20": (1, 64), "mobilenet_v2": (1,)}
TRAINED = ("resnet20", "mobilenet_v2", "mlp", "gpt")
COMPILED = ("resnet20", "mlp")
OURS = "ours"
ELEMENTS = 2_097_152

Cells = Iterator[tuple[str, str]]


def inference(rounds: int) -> Cells:
    """Converted models over ONNX Runtime's own int8 (which saturates on AVX2), and over float32."""
    for name, batches in BATCHES.items():
        network = zoo.FULL_SIZE[name]
        model = network.make()
        zoo.roughen_batch_norms(model, seed=0)
        model.eval()
        data = [network.example_inputs(8, seed)[0] for seed in range(1, 5)]
        prepared = prepare(model, QATConfig(), (data[0],))
        calibrate(prepared, data)
        converted = convert(prepared)
        with tempfile.TemporaryDirectory() as folder:
            float_file = peers.float_file(model, data[0], Path(folder) / "float.onnx")
            file = peers.onnxruntime_quantized(float_file, data, Path(folder) / "int8.onnx")
            model = model.to(memory_format=torch.channels_last)
            for batch in batches:
                (x,) = network.example_inputs(batch)
                channels_last = x.contiguous(memory_format=torch.channels_last)
                calls = {
                    "float32": lambda model=model, x=channels_last: model(x),
                    "ours": lambda converted=converted, x=x: converted(x),
                    "onnxruntime": peers.onnxruntime_call(file, x, THREADS),
                }
                with torch.inference_mode():
                    times = {key: timing.median for key, timing in time_in_turns(calls, rounds).items()}
                where = f"{name}, batch {batch}"
                yield f"converted / ONNX Runtime int8: {where}", _ratio(times["ours"], times["onnxruntime"])
                yield f"converted / float32 channels-last: {where}", _ratio(times["ours"], times["float32"])


def training(rounds: int) -> Cells:
    """A training step over float32's, in time and in bytes saved for backward."""
    console = Console(stderr=True)
    results = measure(list(TRAINED), [FLOAT, OURS], rounds, console)
    for name in TRAINED:
        ratios = results.ratios(name, OURS)
        if ratios is None:
            continue
        title = WORKLOADS[name].title
        times = (results.times[name, contender].median for contender in (OURS, FLOAT))
        yield f"training step / float32: {title}", _ratio(*times)
        yield f"saved for backward / float32: {title}", f"**{ratios[1]:.2f}**"


def compiled(rounds: int) -> Cells:
    """A compiled training step over float32's, compiled."""
    console = Console(stderr=True)
    contenders = [f"{name}, compiled" for name in (FLOAT, OURS)]
    assert not set(contenders) & set(EAGER)
    results = measure(list(COMPILED), [FLOAT, *contenders], rounds, console)
    for name in COMPILED:
        times = [results.times[name, contender].median for contender in reversed(contenders)]
        yield f"compiled training step / compiled float32: {WORKLOADS[name].title}", _ratio(*times)


def operator(rounds: int) -> Cells:
    """Fake quantization, forward and backward, over a product with a number."""
    x = torch.randn(ELEMENTS, requires_grad=True)
    gradient = torch.randn(ELEMENTS)
    scheme = QuantizationScheme(symmetric=False)
    parameters = QuantizationParameters(torch.tensor([0.05]), torch.tensor([3]), scheme)
    calls = {
        "product": lambda: torch.autograd.grad(x * 1.5, x, gradient),
        "ours": lambda: torch.autograd.grad(fake_quantize(x, parameters), x, gradient),
    }
    times = {key: timing.median for key, timing in time_in_turns(calls, 2 * rounds).items()}
    yield "fake quantize, forward and backward, 2.1 M / `x * 1.5`", _ratio(times["ours"], times["product"])


def _ratio(ours: float, other: float) -> str:
    return f"**{ours / other:.2f}** ({ours:.3g}, {other:.3g})"


PARTS = {"inference": inference, "training": training, "compiled": compiled, "operator": operator}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    console = Console()
    table = ColumnsByKind("processors", ("ratio of times",))
    for part in arguments.parts:
        for row, cell in PARTS[part](arguments.rounds):
            console.print(row, cell, markup=False)
            table.set((row,), cell)
    table.write(
        "Kinds of processor",
        (
            "`python benchmarks/processors.py`: ratios, and both times in milliseconds, medians of blocks of calls",
            "taken in turn. ONNX Runtime runs its own quantizer's file; its products saturate on AVX2, ours do not.",
        ),
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of the exporters
    main()
