"""Deployment engines, a file each: the grids that an engine takes, how it computes, and how its files are written.

Another engine is another file here; where its files are of another format than those that there are, a writer in
``export/`` and a session in ``verification/`` beside it.
"""

from __future__ import annotations

from . import executorch, litert, onnxruntime, openvino, tensorrt
from .target import Conventions, Operations, Target

__all__ = ["TARGETS", "Conventions", "Operations", "Target"]

# In the order in which a target is looked for: the grids of TensorRT are among those of OpenVINO.
TARGETS = {
    "onnxruntime": onnxruntime.TARGET,
    "tensorrt": tensorrt.TARGET,
    "openvino": openvino.TARGET,
    "executorch": executorch.TARGET,
    "litert": litert.TARGET,
}
