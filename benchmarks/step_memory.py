"""Memory of one training step of one contender, as JSON: run by ``training_step.py`` in a process of its own.

What is kept for backward is what the step allocated and still holds when its forward has returned the loss: all that
autograd saved, and whatever a contender keeps beside it. Parameters, buffers, momentum and the batch lie there before
and do not count. (The figure agrees with ``torch.autograd.graph.saved_tensors_hooks``, unique storages counted, to
the byte where nothing is kept elsewhere.) The peak is the most that was held at any time of the step.

    python benchmarks/step_memory.py resnet20 ours
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat_peers import set_up
from workloads import WORKLOADS, TrainingStep, reason

THREADS = 2
FORWARD_IS_DONE = "forward is done"


def memory_of(step: TrainingStep) -> dict[str, int]:
    """Bytes saved for backward, and bytes at the peak, of one step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = step.forward()
        with record_function(FORWARD_IS_DONE):
            pass
        step.finish(loss)
        del loss
    events = profiler.profiler.kineto_results.events()
    done = next(event.start_ns() for event in events if event.name() == FORWARD_IS_DONE)
    held = peak = saved = 0
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    for time, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
        if time <= done:
            saved = held
    return {"saved": saved, "peak": peak}


def main() -> None:
    """Prints the figures, or why there are none."""
    workload = WORKLOADS[sys.argv[1]]
    torch.set_num_threads(THREADS)
    inputs, targets = workload.data()
    result: dict[str, int | str]
    try:
        step = TrainingStep(set_up(sys.argv[2], workload.model(), inputs), inputs, targets)
        for _ in range(3):  # statistics, momentum, compilation
            step()
        result = {**memory_of(step)}
    except Exception as error:
        result = {"error": reason(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
