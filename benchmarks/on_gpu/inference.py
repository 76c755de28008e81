"""Converted models against the same networks in bfloat16, both compiled."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import torch
from torch import Tensor
from workloads import Workload

from .record import WORKLOAD, Recorder, Target
from .timing import Call, captured, compiler, synchronize, time_in_turns
from .workloads import converted_of, workload_of

FLOAT, GRAPHS = "bfloat16, compiled", "reduce-overhead"
OURS = "ours"

# Of the faster of bfloat16's two.
TIMES = {"mlp": Target(0.70), "gpt": Target(0.70), "resnet50": Target(0.80)}


def run(network: str, record: Recorder, device: torch.device, rehearses: bool) -> None:
    """Times the ways to run the network in evaluation; the outputs of ours must be equal."""
    workload = workload_of(network, rehearses)
    record.fact(f"{WORKLOAD} {network}", f"{workload.title}, {workload.description}")
    inputs = tuple(x.to(device) for x in workload.data()[0])
    with torch.no_grad():
        calls = _calls(record, network, workload, inputs, device)
        rounds, number, seconds = (2, 1, 0.5) if rehearses else (9, 5, 4.0)
        times = time_in_turns(calls, device, rounds, number, seconds)
    floats = [time for name, time in times.items() if name.startswith(FLOAT)]
    for name, time in times.items():
        record.figure(f"{network}: {name}", time, "ms")
        if floats and name.startswith(OURS):
            target = TIMES[network] if name == f"{OURS}, compiled, {GRAPHS}" else None
            record.figure(f"{network}: {name} / {FLOAT}", time / min(floats), "", target)


def compile_ahead(network: str, record: Recorder, device: torch.device, rehearses: bool) -> None:
    """Fills the compiler's cache on disk for :func:`run`."""
    workload = workload_of(network, rehearses)
    with torch.no_grad():
        _calls(record, network, workload, tuple(x.to(device) for x in workload.data()[0]), device)


def _calls(
    record: Recorder, network: str, workload: Workload, inputs: tuple[Tensor, ...], device: torch.device
) -> dict[str, Call]:
    half = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    float_model = workload.model().eval().to(device, torch.bfloat16)
    converted = converted_of(workload, device)
    calls: dict[str, Call] = {}
    expected = converted(*inputs).clone()

    def add(name: str, make: Callable[[], Call]) -> None:
        try:
            call = make()
            for _ in range(3):
                result = call()
            synchronize(device)
            if name.startswith(OURS):
                same = isinstance(result, Tensor) and torch.equal(result, expected)
                record.fact(f"{network}: {name}, gives what it gives eagerly", same)
            calls[name] = call
        except Exception as error:
            record.failure(f"{network}: {name}", error)
        gc.collect()

    add(OURS, lambda: lambda: converted(*inputs))
    add(f"{OURS}, captured", lambda: captured(lambda: converted(*inputs), device))
    for mode in (None, GRAPHS):
        suffix = "" if mode is None else f", {mode}"
        model = copy.deepcopy(float_model)
        model.compile(**compiler(device, mode))
        add(f"{FLOAT}{suffix}", lambda model=model: lambda: model(*half))
    # Its integer operators are calls in the graph: graphs of the device are what compiling is for.
    compiled = copy.deepcopy(converted)
    compiled.compile(**compiler(device, GRAPHS))
    add(f"{OURS}, compiled, {GRAPHS}", lambda: lambda: compiled(*inputs))
    return calls
