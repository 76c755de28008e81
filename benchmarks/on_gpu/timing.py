"""Times on the device: contenders in turns, each a block of calls between two events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Call, calls: int, device: torch.device) -> float:
    """Of one call, in a block of them: on a GPU between events, elsewhere by the clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls * 1000


def time_in_turns(
    contenders: Mapping[str, Call], device: torch.device, rounds: int, calls: int, seconds: float
) -> dict[str, float]:
    """The median of the rounds, in milliseconds; the rounds end early where they have taken so many seconds.

    Every round gives each contender a block of calls, so that clocks and heat fall on all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    begin = time.perf_counter()
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(milliseconds(call, calls, device))
        if time.perf_counter() - begin > seconds:
            break
    return {name: statistics.median(each) for name, each in times.items()}


def copy_bandwidth(device: torch.device, elements: int) -> float:
    """Gigabytes a second, read and written, of a copy of so many float32."""
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    time = time_in_turns({"copy": lambda: target.copy_(source)}, device, rounds=9, calls=10, seconds=2.0)["copy"]
    return 2 * source.nbytes / time / 1e6


def captured(call: Call, device: torch.device) -> Call:
    """The kernels that a call launches, as one CUDA graph: their time without Python's. On a CPU, the call."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def compiler(device: torch.device, mode: str | None = None) -> dict[str, Any]:
    """Options of ``torch.compile``; in a rehearsal it traces, and compiles nothing."""
    return {"mode": mode} if device.type == "cuda" else {"backend": "aot_eager"}
