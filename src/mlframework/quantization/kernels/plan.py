"""Which backend runs a layer: chosen once, from a description that holds no tensors."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.backend import Backend, SumsBackend
from .backends.compiled import COMPILED
from .backends.exact_floats import EXACT_FLOATS
from .backends.int_mm import INT_MM
from .backends.onednn import ONEDNN
from .backends.phases import PHASES
from .backends.triton_gpu import TRITON_GPU
from .devices import Kernels, is_traced, kernels_for, kernels_on
from .geometry import ConvolutionGeometry, is_dense_or_depthwise
from .operators.declaration import FLOATS_ON_GPU
from .products import Description

# In the order of preference.
_SUMS: tuple[SumsBackend, ...] = (INT_MM, ONEDNN, EXACT_FLOATS)
_LAYERS: tuple[Backend, ...] = (COMPILED, TRITON_GPU, PHASES, *_SUMS)


def plan(description: Description) -> Backend:
    """The backend for a layer."""
    return next(backend for backend in _LAYERS if backend.takes(description))


def plan_sums(description: Description) -> SumsBackend:
    """The backend for the sums of a layer alone."""
    return next(backend for backend in _SUMS if backend.takes(description))


class TrainingDescription(NamedTuple):
    """What of a layer in training says who can run it.

    Attributes:
        weight: its shape, (O, I / groups, *kernel).
        geometry: of a convolution; None for a linear layer.
        input_dtype, weight_dtype: in floating point.
        device: the type of the device that the input lies on, and its index, -1 for a CPU.
    """

    weight: tuple[int, ...]
    geometry: ConvolutionGeometry | None
    input_dtype: torch.dtype
    weight_dtype: torch.dtype
    device: tuple[str, int]


# What layers, and what follows them, are computed of in training.
_TRAINING_DTYPES: dict[Kernels, tuple[torch.dtype, ...]] = {
    "compiled": (torch.float32,),
    "triton": FLOATS_ON_GPU,
}

# Any uint8 code by any int8 code: so many products stay within an int32, with as much room again for the bias.
_MOST_PRODUCTS = 2**30 // (255 * 128)


def trains_on_integers(description: TrainingDescription) -> bool:
    """Whether there are kernels of ``train_layer`` for such a layer: in one or two dimensions, dense or depthwise, with
    sums that stay within the accumulator; on a CPU in float32."""
    kernels = kernels_on(*description.device)
    # A compiler traces; a cache would be one more thing that may change.
    return _has_training_form(description, kernels) if is_traced() else _planned(description, kernels)


def _has_training_form(description: TrainingDescription, kernels: Kernels | None) -> bool:
    weight, geometry = description.weight, description.geometry
    if kernels is None:
        return False
    if not {description.input_dtype, description.weight_dtype} <= set(_TRAINING_DTYPES[kernels]):
        return False
    if len(weight) not in ((2,) if geometry is None else (3, 4)) or 0 in weight:
        return False
    groups = 1 if geometry is None else geometry.groups
    return is_dense_or_depthwise(weight, groups) and math.prod(weight[1:]) <= _MOST_PRODUCTS


_planned = functools.cache(_has_training_form)


def fuses(values: Tensor) -> bool:
    """Whether kernels do in one step what follows a layer in training: on a CPU, of float32 values."""
    kernels = kernels_for(values)
    return kernels is not None and values.dtype in _TRAINING_DTYPES[kernels] and values.numel() > 0
