"""Files for LiteRT: codes that differ from the converted model's, and the time of a call against litert-torch's files.

Of the same networks, calibrated on the same batches: this library's file, the float network through litert-torch, and
litert-torch's own quantization (PT2E), as its documentation sets it up. All run in LiteRT's interpreter with XNNPACK,
in turns, in one process. litert-torch brings two gigabytes (JAX among them), so it is no part of an extra:

    pip install litert-torch
    python benchmarks/litert_files.py [--networks mobilenet_v2] [--inputs 1000] [--write]
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from device_networks import (
    CALIBRATION_BATCH,
    CALIBRATION_BATCHES,
    FLOAT,
    OURS,
    Case,
    Result,
    differing_codes,
    network_of,
    run_benchmark,
)
from results_file import environment
from timing import time_in_turns
from torch import Tensor, nn

from mlframework.quantization import QATConfig, calibrate, convert, export, prepare

PT2E = "litert-torch PT2E"
THREADS = 2


def files_of(case: Case, folder: Path) -> tuple[nn.Module, dict[str, Path]]:
    """The converted model, and a file of each contender."""
    import litert_torch

    batches = [case.batch(CALIBRATION_BATCH, seed) for seed in range(CALIBRATION_BATCHES)]
    example = (case.batch(1, 0),)
    model = network_of(case)
    prepared = prepare(model, QATConfig.for_target("litert"), example)
    calibrate(prepared, batches)
    paths = {name: folder / f"{index}.tflite" for index, name in enumerate((OURS, FLOAT, PT2E))}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="outside of XNNPACK")  # nothing may be
        export(prepared, example, paths[OURS])
    litert_torch.convert(model, example).export(str(paths[FLOAT]))
    try:
        pt2e(model, example, batches).export(str(paths[PT2E]))
    except AssertionError:  # of a U-Net's ReLUs, which change their inputs
        del paths[PT2E]
    return convert(prepared), paths


def pt2e(model: nn.Module, example: tuple[Tensor, ...], batches: Sequence[Tensor]) -> Any:
    """As in "PT2E Quantization" of litert-torch's documentation: static, per channel."""
    import litert_torch
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False))
    prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
    with torch.no_grad():
        for batch in batches:
            for image in batch.split(1):
                prepared(image)
    converted = convert_pt2e(prepared, fold_quantize=False)
    return litert_torch.convert(converted, example, quant_config=QuantConfig(pt2e_quantizer=quantizer))


class Runner:
    """A file in LiteRT's interpreter, through XNNPACK."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(str(path), num_threads=THREADS)
        self.interpreter.allocate_tensors()
        (self.input,), (self.output, *_) = self.interpreter.get_input_details(), self.interpreter.get_output_details()

    def as_read(self, x: Tensor) -> Any:
        """An input as the file takes it: litert-torch's quantized ones take codes, and have no quantize node to run."""
        if self.input["dtype"].__name__ != "int8":
            return x.numpy()
        scale, zero_point = self.input["quantization"]
        return (x / scale + zero_point).round().clamp(-128, 127).to(torch.int8).numpy()

    def __call__(self, values: Any) -> Tensor:
        """The first output."""
        self.interpreter.set_tensor(self.input["index"], values)
        self.interpreter.invoke()
        return torch.from_numpy(self.interpreter.get_tensor(self.output["index"]))


def measure(case: Case, inputs: int, rounds: int) -> Result:
    """Codes on ``inputs`` inputs, one at a time, and milliseconds of a call."""
    with tempfile.TemporaryDirectory() as folder:
        converted, paths = files_of(case, Path(folder))
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        runners = {name: Runner(path) for name, path in paths.items()}
    found = differing_codes(case, converted, lambda x: runners[OURS](x.numpy()), inputs)
    x = case.batch(1, 0)
    values = {name: run.as_read(x) for name, run in runners.items()}
    calls = {name: lambda run=run, value=values[name]: run(value) for name, run in runners.items()}
    times = time_in_turns(calls, rounds)
    return Result(inputs, *found, times, sizes)


def section(rounds: int) -> tuple[str, ...]:
    """Heading, and what is said before the table."""
    return (
        "Files for LiteRT",
        "`python benchmarks/litert_files.py --write`: one input a call, random weights, calibrated on the same 32",
        "inputs. Codes are those of the model's result, in LiteRT against the converted model; milliseconds are",
        f"medians of {rounds} rounds taken in turn, all in LiteRT's interpreter with XNNPACK, on {THREADS}",
        "threads. litert-torch's quantized files take int8 codes and return them; the others floats.",
        f"{environment()} LiteRT {version('ai-edge-litert')}, litert-torch {version('litert-torch')}.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The benchmark."""
    run_benchmark(__doc__, measure, (FLOAT, PT2E), section, "litert", arguments)


if __name__ == "__main__":
    main()
