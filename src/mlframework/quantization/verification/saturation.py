"""Whether ONNX Runtime's integer products are exact on this processor, found out by asking it.

Without VNNI, x86 multiplies uint8 by int8 in pairs that saturate at 16 bits. Flags of the processor do not tell what a
library makes of it, so ONNX Runtime is given the largest products there are, once per process, and believed only if
they come out right.
"""

from __future__ import annotations

import functools

# The session option under which ONNX Runtime multiplies uint8 by uint8 instead, whose sums do not saturate.
EXACT_PRODUCTS = "session.x64quantprecision"

_LENGTH = 64


@functools.cache
def plain_sessions_saturate() -> bool:
    """Whether a session on this machine's CPU gives wrong sums unless it is told to be exact.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
    """
    import numpy as np
    import onnxruntime  # type: ignore[import-untyped]
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.full((_LENGTH, _LENGTH), 127, np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["codes", "weight"], ["sums"])],
        "largest_products",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, [_LENGTH, _LENGTH])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [_LENGTH, _LENGTH])],
        [weight],
    )
    # Versions that every ONNX Runtime of these years reads; those of the installed onnx may be newer than it.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"codes": np.full((_LENGTH, _LENGTH), 255, np.uint8)})
    return bool((sums != 255 * 127 * _LENGTH).any())
