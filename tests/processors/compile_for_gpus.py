"""Compiles the kernels for GPUs without one: of each operator's samples, what a call of it would launch.

Run as a program, in a process where Triton is not its interpreter: ``compile_for_gpus.py <capability> [operator ...]``.
It prints, for each kernel, in how many variants it was compiled, as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from example_operators import HALF_PRECISION, LABELS, in_half_precision, samples
from mlframework.quantization.kernels.triton_gpu.registration import IMPLEMENTED, function_of


class CompilesOnly(DriverBase):
    """A GPU of that compute capability, which nothing can be launched on."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """Of what is measured, each is compiled."""
        return lambda run, **options: run() is None

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


def main(capability: int, names: list[str]) -> None:
    triton.runtime.driver.set_active(CompilesOnly(capability))
    run = triton.runtime.JITFunction.run
    compiled: dict[str, set[str]] = {}

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled.setdefault(self.__name__, set()).add(kernel.hash)
        check(self.__name__, kernel.asm)
        return kernel

    triton.runtime.JITFunction.run = compile_only
    for module, operators in IMPLEMENTED.items():
        for operator in operators:
            for name, label in LABELS:
                if name == operator and (not names or name in names):
                    function_of(module, name)(*samples(name)[label])
                    for dtype in (torch.bfloat16, torch.float16) if name in HALF_PRECISION else ():
                        function_of(module, name)(*in_half_precision(name, samples(name)[label], dtype))
    print(json.dumps({name: len(variants) for name, variants in compiled.items()}))


def check(name: str, assembly: dict[str, str]) -> None:
    """Nothing is contracted, and no address is computed in 32 bits."""
    contracted = Counter(re.findall(r"\bfma\.rn\.f32\b", assembly["ptx"]))
    assert not contracted, f"{name} contracts products and sums: {contracted}"
    if name == "dense":
        on_tensor_cores = re.search(r"(wgmma\.mma_async|mma)\.sync\.\S+\.s32\.s8\.s8", assembly["ptx"])
        assert on_tensor_cores, f"{name} multiplies without the int8 tensor cores"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
