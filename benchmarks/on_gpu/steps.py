"""Training steps with and without QAT, eager and compiled: time, bytes saved for backward, the peak, and a profile."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import torch
from step_memory import memory_of
from torch import nn
from torch.profiler import ProfilerActivity, profile
from workloads import Workload

from .record import WORKLOAD, Recorder, Target
from .timing import compiler, synchronize, time_in_turns
from .workloads import AutocastStep, prepared_of, workload_of

FLOAT, OURS, RECOMPUTE = "bfloat16", "ours", "ours, recompute"
TORCH_AO = "torch.ao"

# Of the same step without QAT.
TIME, SAVED = Target(1.05), Target(0.70)
# The head of a real vocabulary, whose cross-entropy keeps float logits, weighs on the bytes of both alike: those of a
# GPT are asked for with a small one.
SAVED_OF = ("resnet50", "gpt_bytes")

WARM_UP = 4
PROFILED_KERNELS = 25

Make = Callable[[Workload, torch.device], AutocastStep]


def _float(workload: Workload, device: torch.device) -> AutocastStep:
    return AutocastStep(workload, workload.model(), device)


def _ours(workload: Workload, device: torch.device) -> AutocastStep:
    return AutocastStep(workload, prepared_of(workload, workload.model()), device)


def _recompute(workload: Workload, device: torch.device) -> AutocastStep:
    return AutocastStep(workload, prepared_of(workload, workload.model(), recompute=True), device)


def _torch_ao(workload: Workload, device: torch.device) -> AutocastStep:
    return AutocastStep(workload, _torch_ao_model(workload), device)


def _torch_ao_float32(workload: Workload, device: torch.device) -> AutocastStep:
    return AutocastStep(workload, _torch_ao_model(workload), device, dtype=None)


def _torch_ao_model(workload: Workload) -> nn.Module:
    import torch_ao_eager

    return torch_ao_eager.prepared(workload.model())


OWN: dict[str, Make] = {FLOAT: _float, OURS: _ours}
PEERS: dict[str, Make] = {TORCH_AO: _torch_ao, f"{TORCH_AO}, float32": _torch_ao_float32}
# Of networks with batch normalization, whose input it computes again.
RECOMPUTED: dict[str, Make] = {RECOMPUTE: _recompute}


def eager(network: str, record: Recorder, device: torch.device, rehearses: bool) -> None:
    """Steps as Python runs them: with QAT and without first, then the others."""
    steps = _made(record, network, OWN, device, rehearses, compiles=False)
    _memories(record, network, "eager", steps, device)
    _times(record, network, "eager", steps, device, rehearses)
    for name, step in steps.items():
        _profile(record, f"{network}, eager, {name}", step, device)
    steps.pop(OURS, None)
    others = {**(RECOMPUTED if network == "resnet50" else {}), **PEERS}
    steps |= _made(record, network, others, device, rehearses, compiles=False)
    _memories(record, network, "eager", steps, device)
    _times(record, network, "eager", steps, device, rehearses)


def compiled(network: str, record: Recorder, device: torch.device, rehearses: bool) -> None:
    """The same under ``torch.compile``."""
    steps = _made(record, network, OWN, device, rehearses, compiles=True)
    _times(record, network, "compiled", steps, device, rehearses)
    _memories(record, network, "compiled", steps, device)
    if OURS in steps:
        _profile(record, f"{network}, compiled, {OURS}", steps[OURS], device)


def compile_ahead(network: str, record: Recorder, device: torch.device, rehearses: bool) -> None:
    """Fills the compiler's cache on disk, so that :func:`compiled` finds in it what takes a minute to make."""
    _made(record, network, OWN, device, rehearses, compiles=True)


def _made(
    record: Recorder, network: str, makes: dict[str, Make], device: torch.device, rehearses: bool, compiles: bool
) -> dict[str, AutocastStep]:
    """The steps that run, after their first few: statistics, momentum; compilation."""
    workload = workload_of(network, rehearses)
    record.fact(f"{WORKLOAD} {network}", f"{workload.title}, {workload.description}")
    steps = {}
    for name, make in makes.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.ao is deprecated
                step = make(workload, device)
                for _ in range(WARM_UP):
                    step()
                if compiles:  # what follows on the first batches: they run other code, which would be compiled first
                    step.model.compile(**compiler(device))
                    step()
                    step()
            synchronize(device)
            steps[name] = step
        except Exception as error:
            title = f"{network}: {name}{', compiled' if compiles else ''}"
            record.failure(title, error, is_peer=name in PEERS)
        gc.collect()
    return steps


def _memories(record: Recorder, network: str, way: str, steps: dict[str, AutocastStep], device: torch.device) -> None:
    memory = {name: _memory(step, device) for name, step in steps.items()}
    for name, of_step in memory.items():
        for what, bytes_ in zip(("saved for backward", "peak of a step"), of_step, strict=True):
            record.figure(f"{network}: {name}, {way}, {what}", bytes_ / 2**20, "MiB")
        if name != FLOAT and FLOAT in memory:
            target = SAVED if name == OURS and network in SAVED_OF else None
            saved, peak = (own / other for own, other in zip(of_step, memory[FLOAT], strict=True))
            record.figure(f"{network}: {name} / {FLOAT}, {way}, saved for backward", saved, "", target)
            record.figure(f"{network}: {name} / {FLOAT}, {way}, peak of a step", peak)


def _memory(step: AutocastStep, device: torch.device) -> tuple[int, int]:
    """Bytes that a step has allocated and still holds when its loss is there; and the most that it holds at a time."""
    if device.type != "cuda":
        memory = memory_of(step)
        return memory["saved"], memory["peak"]
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss = step.forward()
    saved = torch.cuda.memory_allocated(device) - before
    step.finish(loss)
    synchronize(device)
    return saved, torch.cuda.max_memory_allocated(device) - before


def _times(
    record: Recorder, network: str, way: str, steps: dict[str, AutocastStep], device: torch.device, rehearses: bool
) -> None:
    rounds, calls, seconds = (2, 1, 0.5) if rehearses else (9, 3, 10.0)
    times = time_in_turns(steps, device, rounds, calls, seconds)
    for name, time in times.items():
        record.figure(f"{network}: {name}, {way}", time, "ms")
        if name != FLOAT and FLOAT in times:
            target = TIME if name == OURS else None
            record.figure(f"{network}: {name} / {FLOAT}, {way}", time / times[FLOAT], "", target)


def _profile(record: Recorder, title: str, step: AutocastStep, device: torch.device) -> None:
    """Writes what takes the time of a step, and of Python around it, to a file."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    try:
        with profile(activities=activities) as profiler:
            step()
            synchronize(device)
    except Exception as error:  # a machine may keep its counters to itself
        record.failure(f"{title}, profile", error, is_peer=True)
        return
    averages = profiler.key_averages()
    orders = [f"self_{device.type}_time_total", "self_cpu_time_total"]
    with (record.folder / "gpu_profiles.txt").open("a", encoding="utf-8") as file:
        for order in dict.fromkeys(orders):
            table = averages.table(sort_by=order, row_limit=PROFILED_KERNELS, max_name_column_width=80)
            file.write(f"==== {title}, by {order}\n{table}\n")
