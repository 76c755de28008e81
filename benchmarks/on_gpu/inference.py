"""Converted models against the same networks in bfloat16, as graphs of the device."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from .record import WORKLOAD, Recorder, Target
from .timing import Call, captured, compiler, synchronize, time_in_turns
from .workloads import converted_of, workload_of

GRAPHS = "reduce-overhead"
FLOAT = f"bfloat16, compiled, {GRAPHS}"
OURS, OURS_CAPTURED, OURS_COMPILED = "ours", "ours, captured", f"ours, compiled, {GRAPHS}"

TIMES = {"mlp": Target(0.70), "gpt": Target(0.70), "resnet50": Target(0.80)}


def run(network: str, record: Recorder, device: torch.device, rehearses: bool) -> None:
    """Times the ways to run the network in evaluation, the one that takes compiling last."""
    rounds, calls, seconds = (2, 1, 0.5) if rehearses else (9, 5, 4.0)
    contenders = Contenders(network, record, device, rehearses)
    with torch.no_grad():
        for names in ((FLOAT, OURS, OURS_CAPTURED), (FLOAT, OURS_COMPILED)):
            times = time_in_turns(contenders.running(names), device, rounds, calls, seconds)
            for name, time in times.items():
                record.figure(f"{network}: {name}", time, "ms")
                if name != FLOAT and FLOAT in times:
                    target = None if name == OURS else TIMES[network]
                    record.figure(f"{network}: {name} / {FLOAT}", time / times[FLOAT], "", target)


def compile_ahead(network: str, record: Recorder, device: torch.device, rehearses: bool) -> None:
    """Fills the compiler's cache on disk for :func:`run`."""
    with torch.no_grad():
        Contenders(network, record, device, rehearses).running((FLOAT, OURS_COMPILED))


class Contenders:
    """The network in bfloat16, compiled, and converted to integers."""

    def __init__(self, network: str, record: Recorder, device: torch.device, rehearses: bool) -> None:
        self.network, self.record, self.device = network, record, device
        workload = workload_of(network, rehearses)
        record.fact(f"{WORKLOAD} {network}", f"{workload.title}, {workload.description}")
        inputs = (x.to(device) for x in workload.data()[0])
        self.inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
        self.float_model = workload.model().eval().to(device, torch.bfloat16)
        self.float_model.compile(**compiler(device, GRAPHS))
        self.converted = converted_of(workload, device)
        # Its integer operators are calls in the graph: graphs of the device are what compiling it is for.
        self.compiled = copy.deepcopy(self.converted)
        self.compiled.compile(**compiler(device, GRAPHS))
        self.calls: dict[str, Call] = {}

    def running(self, names: tuple[str, ...]) -> dict[str, Call]:
        """Those of the names that run."""
        makes: dict[str, Callable[[], Call]] = {
            FLOAT: lambda: lambda: self.float_model(*self.inputs),
            OURS: lambda: lambda: self.converted(*self.inputs),
            OURS_CAPTURED: lambda: captured(lambda: self.converted(*self.inputs), self.device),
            OURS_COMPILED: lambda: lambda: self.compiled(*self.inputs),
        }
        for name in names:
            if name not in self.calls:
                try:
                    call = makes[name]()
                    for _ in range(3):
                        result = call()
                    self._compare(name, result)
                    self.calls[name] = call
                except Exception as error:
                    self.record.failure(f"{self.network}: {name}", error)
        return {name: self.calls[name] for name in names if name in self.calls}

    def _compare(self, name: str, result: object) -> None:
        synchronize(self.device)
        if name in (OURS_CAPTURED, OURS_COMPILED):
            same = isinstance(result, torch.Tensor) and torch.equal(result, self.converted(*self.inputs))
            self.record.fact(f"{self.network}: {name}, gives what it gives eagerly", same)
