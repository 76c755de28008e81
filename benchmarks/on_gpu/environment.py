"""What there is: the card, the versions, the speed of memory, and which kernels run."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from mlframework.quantization import kernels
from mlframework.quantization.kernels import devices

from .record import Recorder
from .timing import copy_bandwidth, milliseconds

PACKAGES = ("triton", "transformers", "numpy", "pytest", "pytest-xdist", "setuptools")
DRIVER = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,mig.mode.current"


def run(record: Recorder, device: torch.device, rehearses: bool) -> None:
    """Records it."""
    record.fact("python", platform.python_version())
    record.fact("torch", torch.__version__)
    for package in PACKAGES:
        try:
            record.fact(package, version(package))
        except PackageNotFoundError:
            record.fact(package, "not installed")
    record.fact("kernels on the CPU", f"{kernels.active_path()}, {kernels.instruction_set()}")
    record.fact("kernels on the device", devices.kernels_on(device.type))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record.fact("card", properties.name)
        record.fact("capability", f"{properties.major}.{properties.minor}")
        record.fact("memory", f"{properties.total_memory / 2**30:.0f} GiB")
        record.fact("multiprocessors", properties.multi_processor_count)
        record.fact("CUDA", torch.version.cuda)
        try:
            command = ["nvidia-smi", f"--query-gpu={DRIVER}", "--format=csv,noheader"]
            record.fact(
                "driver", subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
            )
        except (OSError, subprocess.SubprocessError) as error:
            record.failure("nvidia-smi", error, is_peer=True)
    else:
        record.fact("card", "none (a rehearsal on the CPU)")
    elements = 2**16 if rehearses else 2**28
    record.figure("copy", copy_bandwidth(device, elements), "GB/s, read and written")
    if not rehearses:
        record.figure("bfloat16 matrix product", _matrix_product(device), "TFLOP/s")


def _matrix_product(device: torch.device) -> float:
    size = 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    milliseconds(lambda: left @ right, 3, device)
    return 2 * size**3 / milliseconds(lambda: left @ right, 10, device) / 1e9
