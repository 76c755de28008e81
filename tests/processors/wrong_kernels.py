"""Kernels that are written as none may be, and one that may: prints as JSON what is wrong with each.

Run as a program, in a process where Triton is not its interpreter.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
import triton.language as tl
from compile_for_gpus import CompilesOnly, check


@triton.jit
def right(values, factor, count, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + offset, offset < count, other=0.0)
    tl.store(values + offset, value * factor + 1.0, offset < count)


@triton.jit
def short(values, factor, count, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + offset, offset < count, other=0.0)
    tl.store(values + offset, value * factor + 1.0, offset < count)


@triton.jit
def extended_too_late(values, factor, count, BLOCK: tl.constexpr):
    offset = ((tl.program_id(0) // count) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    value = tl.load(values + offset, offset < count, other=0.0)
    tl.store(values + offset, value * factor + 1.0, offset < count)


@triton.jit
def short_in_a_loop(values, factor, count, BLOCK: tl.constexpr):
    for step in range(tl.program_id(0), count):
        offset = step * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(values + offset, offset < count, other=0.0)
        tl.store(values + offset, value * factor + 1.0, offset < count)


def wrong_with(kernel: Any, **options: Any) -> str | None:
    compiled = kernel.run(torch.zeros(100), 0.5, 100, 64, grid=(2,), warmup=True, **options)
    try:
        check(kernel.__name__, compiled.asm)
    except AssertionError as error:
        return str(error)
    return None


if __name__ == "__main__":
    driver = CompilesOnly()
    driver.capability = 90
    triton.runtime.driver.set_active(driver)
    found = {
        kernel.__name__: wrong_with(kernel, enable_fp_fusion=False)
        for kernel in (right, short, extended_too_late, short_in_a_loop)
    }
    print(json.dumps({**found, "contracted": wrong_with(right)}))
