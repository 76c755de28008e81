"""Whether the kernels in Triton can run: the package is there, and the GPU is one that they are compiled for."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

import torch

from ..constants import constant_in_graphs

# Ampere, the first with the int8 tensor cores that the kernels are written for.
OLDEST_CAPABILITY = (8, 0)


class _State:
    has_warned = False


def is_installed() -> bool:
    """Whether Triton is there to be imported; does not import it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


def is_interpreter() -> bool:
    """Whether Triton runs kernels on the CPU in this process."""
    if not is_installed():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@constant_in_graphs
def runs_on(index: int) -> bool:
    """Whether the kernels run on the GPU of that index (-1: the current one); warns once of a GPU that goes without.

    What it has found of a device holds for as long as the process lasts.
    """
    if not torch.cuda.is_available():
        return False
    device = torch.cuda.current_device() if index < 0 else index
    if device not in _known:
        _known[device] = _finds(device)
    return _known[device]


_known: dict[int, bool] = {}


def _finds(device: int) -> bool:
    name = torch.cuda.get_device_name(device)
    if torch.version.cuda is None:
        return _without(name, "they are written for NVIDIA's GPUs")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        own, oldest = (".".join(map(str, each)) for each in (capability, OLDEST_CAPABILITY))
        return _without(name, f"its compute capability is {own}, and they need {oldest} or newer")
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return _without(name, f"the package triton cannot be imported ({error})")
    return True


def _without(name: str, reason: str) -> bool:
    if not _State.has_warned:
        _State.has_warned = True
        warnings.warn(
            f"mlframework.quantization's GPU kernels do not run on {name}: {reason}. Training and integer layers run "
            "several times slower there, with the same results",
            RuntimeWarning,
            stacklevel=2,
        )
    return False
