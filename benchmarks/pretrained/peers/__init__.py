"""Other libraries as methods, each set up as its own documents say; a file for each."""

from __future__ import annotations

from ..methods import Method
from . import aimet, brevitas, nncf, onnx_runtime, pt2e

PEERS: dict[str, Method] = {**onnx_runtime.METHODS, **nncf.METHODS, **pt2e.METHODS, **brevitas.METHODS, **aimet.METHODS}
