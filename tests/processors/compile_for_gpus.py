"""Compiles the kernels for GPUs without one: of each operator's samples, what a call of it would launch.

Launches that differ in sizes and alignment alone are compiled once. Run as a program, in a process where Triton is not
its interpreter: ``compile_for_gpus.py 90,80 [operator ... | --some | --tiles]``.
It prints as JSON, for each operator, which kernels it launches; of ``--tiles``, which are large layers, how many bytes
of shared memory each kernel takes.
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

from example_operators import samples_on_gpu
from mlframework.quantization.kernels.triton_gpu.registration import IMPLEMENTED, function_of


class CompilesOnly(DriverBase):
    """A GPU for each compute capability, by which it is numbered; nothing can be launched on one."""

    capability: int

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """Of what is to be measured, each is compiled."""
        return lambda run, **options: run() is None

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


def main(capabilities: list[int], names: list[str]) -> None:
    driver = CompilesOnly()
    triton.runtime.driver.set_active(driver)
    run = triton.runtime.JITFunction.run
    compiled: set[tuple[Any, ...]] = set()
    launched: dict[str, set[str]] = {}
    memory: list[int] = []

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched[name].add(self.__name__)
        for driver.capability in capabilities:
            if names == ["--some"]:
                needed = some_of(self.__name__, arguments, driver.capability == capabilities[0])
            else:
                needed = all_of(self.__name__, arguments, options, driver.capability)
            if names == ["--tiles"] or not compiled.issuperset(needed):
                compiled.update(needed)
                kernel = run(self, *arguments, grid=grid, warmup=True, **options)
                check(self.__name__, kernel.asm)
                memory.append(kernel.metadata.shared)

    triton.runtime.JITFunction.run = compile_only
    for module, operators in IMPLEMENTED.items():
        for name in operators:
            if names in ([], ["--some"]) or name in names:
                launched[name] = set()
                for arguments in samples_on_gpu(name).values():
                    function_of(module, name)(*arguments)
    if names == ["--tiles"]:
        name = "folded_layer"
        launched[name] = set()
        large_layers()
        print(json.dumps(memory))
        return
    if names in ([], ["--some"]) or "folded_layer" in names:
        name = "folded_layer"
        finish_library_products()
    print(json.dumps({name: sorted(kernels) for name, kernels in launched.items()}))


def large_layers() -> None:
    """Layers that fill every tile, each with all configurations."""
    from mlframework.quantization.kernels.triton_gpu import products
    from mlframework.quantization.kernels.triton_gpu.layers import folded_layer

    numbers = (torch.zeros(256, dtype=torch.int32), torch.ones(256), 3, 0.0, 255.0, torch.uint8)
    for configuration in products._CONFIGURATIONS:
        products.fastest = lambda key, choices, run, chosen=configuration: chosen  # type: ignore[attr-defined]
        rows = torch.zeros(512, 256, dtype=torch.uint8)
        folded_layer(rows, 3, torch.zeros(256, 256, dtype=torch.int8), *numbers, [], [], [], 1)
        images = torch.zeros(2, 256, 16, 16, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        window = torch.zeros(256, 3, 3, 256, dtype=torch.int8)
        for padding_code in (0, 3):
            folded_layer(images, padding_code, window, *numbers, [1, 1], [1, 1], [1, 1], 1)


def finish_library_products() -> None:
    """What a layer launches only where there is a GPU: its rest, after a product that a library has computed."""
    from mlframework.quantization.kernels.triton_gpu.library_products import through_library
    from mlframework.quantization.kernels.triton_gpu.results import Result

    rows, weight = torch.zeros(24, 16, dtype=torch.uint8), torch.zeros(8, 16, dtype=torch.int8)
    end = torch.zeros(1, dtype=torch.int32)
    for dtype in (torch.uint8, torch.int8, torch.float32, torch.bfloat16, torch.float16):
        for grid in ((3.0, 0.0, 255.0), (end, end, end)):
            result = Result(torch.zeros(8, dtype=torch.int32), torch.ones(8), *grid)
            through_library(rows, weight, result, torch.empty(24, 8, dtype=dtype))


def all_of(name: str, arguments: tuple[Any, ...], options: dict[str, Any], capability: int) -> set[tuple[Any, ...]]:
    """What a launch compiles that differs in more than sizes: which lines of the kernel, and with which types."""
    kinds = [
        each.dtype if isinstance(each, torch.Tensor) else each if isinstance(each, bool) else type(each)
        for each in arguments
    ]
    # Triton makes a constant of every 1, which is another thing to a kernel than a number: once for each argument.
    ones = {(capability, name, place) for place, kind in enumerate(kinds) if kind is int and arguments[place] == 1}
    return ones | {(capability, name, *kinds, *options.items())}


def some_of(name: str, arguments: tuple[Any, ...], is_first: bool) -> set[tuple[Any, ...]]:
    """Every line of the kernel for one capability, and the kernel once for the others."""
    flags = [argument for argument in arguments if isinstance(argument, bool)] if is_first else []
    return {(is_first, name, *flags)}


def check(name: str, assembly: dict[str, str]) -> None:
    """Nothing is contracted, and no offset of a program is computed in 32 bits."""
    contracted = Counter(re.findall(r"\bfma\.rn\.\w+", assembly["ptx"]))
    assert not contracted, f"{name} contracts products and sums: {contracted}"
    short = products_in_32_bits(assembly["ttir"])
    assert not short, f"{name} computes in 32 bits what a program's number is multiplied by, and it overflows: {short}"
    if name == "dense":
        on_tensor_cores = re.search(r"(wgmma\.mma_async|mma)\.sync\.\S+\.s32\.s8\.s8", assembly["ptx"])
        assert on_tensor_cores, f"{name} multiplies without the int8 tensor cores"


def products_in_32_bits(code: str) -> list[str]:
    """Of a kernel in Triton's intermediate language, the lines that multiply in 32 bits what follows from the number of
    a program: they overflow on a tensor of 2**31 elements. A number that was extended to 64 bits is not followed."""
    followers: set[str] = set()
    products = []
    for line in code.splitlines():
        line = line.partition(" loc(")[0].strip()
        if "scf.for" in line:  # which names its counter, and what it carries, beside what these start with
            names = set(re.findall(r"%\w+", line))
            followers |= set() if followers.isdisjoint(names) else names
            continue
        result, _, operation = line.partition(" = ")
        results, operands = (set(re.findall(r"%\w+", part)) for part in (result, operation))
        follows = operation.startswith("tt.get_program_id") or not followers.isdisjoint(operands)
        if follows and has_result_in_32_bits(operation):
            if operation.startswith(("arith.muli", "arith.shli")):
                products.append(line)
            followers |= results
        else:
            followers -= results  # regions side by side use the same names
    return products


def has_result_in_32_bits(operation: str) -> bool:
    """Whether an operation's result is of 32-bit integers; neither a pointer, nor what was loaded or compared."""
    _, _, types = operation.partition(" : ")
    result = re.split(r" -> | to ", types)[-1]
    return re.search(r"(\b|x)i32\b", result) is not None and "ptr" not in types and "arith.cmp" not in operation


if __name__ == "__main__":
    main([int(capability) for capability in sys.argv[1].split(",")], sys.argv[2:])
