"""Files for ExecuTorch: codes that differ from the converted model's, and the time of a call against others' files.

Of the same networks, calibrated on the same batches: this library's file, the float network through the same XNNPACK,
and torchao's own flow (PT2E) with ``XNNPACKQuantizer``, as ExecuTorch's documentation sets it up. All run in
ExecuTorch's runtime, in turns, in one process.

    python benchmarks/executorch_files.py [--networks mobilenet_v2] [--inputs 1000] [--write]
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

PT2E = "torchao PT2E"


def files_of(case: Case, folder: Path) -> tuple[nn.Module, dict[str, Path]]:
    """The converted model, and a file of each contender."""
    batches = [case.batch(CALIBRATION_BATCH, seed) for seed in range(CALIBRATION_BATCHES)]
    example = (case.batch(1, 0),)
    model = network_of(case)
    prepared = prepare(model, QATConfig.for_target("executorch"), example)
    calibrate(prepared, batches)
    paths = {name: folder / f"{index}.pte" for index, name in enumerate((OURS, FLOAT, PT2E))}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="outside of XNNPACK")  # nothing may be
        export(prepared, example, paths[OURS])
    paths[FLOAT].write_bytes(lowered(torch.export.export(model, example)))
    paths[PT2E].write_bytes(lowered(torch.export.export(pt2e(model, example, batches), example)))
    return convert(prepared), paths


def pt2e(model: nn.Module, example: tuple[Tensor, ...], batches: Sequence[Tensor]) -> nn.Module:
    """As in "Quantizing with XNNPACK" of ExecuTorch's documentation: per channel, calibrated."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
    with torch.no_grad():
        for batch in batches:
            for image in batch.split(1):
                prepared(image)
    converted: nn.Module = convert_pt2e(prepared)
    return converted


def lowered(program: torch.export.ExportedProgram) -> bytes:
    """Through XNNPACK, as every contender's."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    buffer: bytes = edge.to_executorch().buffer
    return buffer


def measure(case: Case, inputs: int, rounds: int) -> Result:
    """Codes on ``inputs`` inputs, one at a time, and milliseconds of a call."""
    from executorch.runtime import Runtime

    with tempfile.TemporaryDirectory() as folder:
        converted, paths = files_of(case, Path(folder))
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        programs = {name: Runtime.get().load_program(path.read_bytes()) for name, path in paths.items()}
    methods: dict[str, Any] = {name: program.load_method("forward") for name, program in programs.items()}
    found = differing_codes(case, converted, lambda x: methods[OURS].execute([x])[0], inputs)
    x = case.batch(1, 0)
    times = time_in_turns({name: lambda method=method: method.execute([x]) for name, method in methods.items()}, rounds)
    return Result(inputs, *found, times, sizes)


def section(rounds: int) -> tuple[str, ...]:
    """Heading, and what is said before the table."""
    return (
        "Files for ExecuTorch",
        "`python benchmarks/executorch_files.py --write`: one input a call, random weights, calibrated on the same",
        "32 inputs. Codes are those of the model's result, in ExecuTorch against the converted model; milliseconds",
        f"are medians of {rounds} rounds taken in turn, all in ExecuTorch's runtime.",
        f"{environment()} ExecuTorch {version('executorch')}, torchao {version('torchao')}.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The benchmark."""
    run_benchmark(__doc__, measure, (FLOAT, PT2E), section, "executorch", arguments)


if __name__ == "__main__":
    main()
