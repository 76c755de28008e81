"""An exported file: what is in it, what ONNX Runtime makes of it, and what it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mlframework.quantization import QATConfig, calibrate, convert, prepare
from mlframework.quantization.export.export_onnx import export_onnx
from mlframework.quantization.verification.saturation import EXACT_PRODUCTS, plain_sessions_saturate

INTEGERS = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)

# What computes on floats; where a network is fully integer, ONNX Runtime's optimized graph has none of them.
FLOAT_COMPUTATION = {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "Mul"}


def prepared_model(model: nn.Module, shape: tuple[int, ...], target: str = "onnxruntime", **options: Any) -> nn.Module:
    """Calibrated on random data; no training."""
    model.eval()
    prepared = prepare(model, QATConfig(target=target, **options), (inputs_of(shape, 2),))
    calibrate(prepared, [inputs_of(shape, 16) for _ in range(3)])
    return prepared


def inputs_of(shape: tuple[int, ...], batch: int) -> Tensor:
    return torch.randn(batch, *shape) + 0.2


class ExportedFile:
    """A converted model and its file."""

    def __init__(
        self, model: nn.Module, example: tuple[Any, ...], folder: Path, target: str | None = None, **options: Any
    ) -> None:
        self.path = folder / "model.onnx"
        self.converted = convert(model)
        export_onnx(self.converted, example, self.path, target, **options)
        self.model = onnx.load(self.path)
        self.graph = self.model.graph

    @classmethod
    def of(
        cls, model: nn.Module, shape: tuple[int, ...], folder: Path, target: str = "onnxruntime", **options: Any
    ) -> ExportedFile:
        """Prepares, calibrates, converts and exports for batches of that shape."""
        return cls(prepared_model(model, shape, target, **options), (inputs_of(shape, 2),), folder, target)

    @property
    def kinds(self) -> Counter[str]:
        """How many nodes of each kind there are."""
        return Counter(node.op_type for node in self.graph.node)

    def nodes(self, kind: str) -> list[Any]:
        return [node for node in self.graph.node if node.op_type == kind]

    def constant(self, name: str) -> np.ndarray:
        """The value of an initializer."""
        (found,) = [value for value in self.graph.initializer if value.name == name]
        return onnx.numpy_helper.to_array(found)

    def maker(self, value: str) -> Any:
        """The node that makes a value; None for an input or an initializer."""
        return next((node for node in self.graph.node if value in node.output), None)

    def readers(self, value: str) -> list[Any]:
        return [node for node in self.graph.node if value in node.input]

    def optimized_kinds(self, exact: bool = False) -> Counter[str]:
        """The kinds of nodes that ONNX Runtime runs, by default or with exact products."""
        path = self.path.with_suffix(".optimized.onnx")
        session_of(self.path.read_bytes(), exact, optimized=path)
        return Counter(node.op_type for node in onnx.load(path).graph.node)

    def results(self, *inputs: Tensor, threads: int = 1) -> list[np.ndarray]:
        """What the file computes."""
        session = session_of(self.path.read_bytes(), threads=threads)
        return session.run(None, self._feed(inputs))

    def exact_results(self, x: Tensor) -> Tensor:
        """What the file computes with exact products."""
        (result,) = session_of(self.path.read_bytes(), exact=True).run(None, self._feed([x]))
        return torch.from_numpy(result)

    def codes(self, *inputs: Tensor) -> dict[str, np.ndarray]:
        """The integer values of the graph by name."""
        model = onnx.shape_inference.infer_shapes(self.model)
        outputs = {value.name for value in self.graph.output}
        integers = [
            value
            for value in model.graph.value_info
            if value.type.tensor_type.elem_type in INTEGERS and value.name not in outputs
        ]
        model.graph.output.extend(integers)
        session = session_of(model.SerializeToString())
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, self._feed(inputs)), strict=True))

    def _feed(self, inputs: Iterable[Tensor]) -> dict[str, np.ndarray]:
        return {value.name: tensor.numpy() for value, tensor in zip(self.graph.input, inputs, strict=True)}

    def differences(self, *inputs: Tensor, float_tolerance: float = 0.0) -> tuple[dict[str, int], int]:
        """Differing elements by layer and result (those that differ), and how many layers were compared.

        Results may differ by a tolerance where a float layer makes them, whose sums no two libraries form alike.
        """
        outputs: dict[str, Any] = {}
        handles = [
            module.register_forward_hook(lambda _, args, output, name=name: outputs.__setitem__(name, output))
            for name, module in self.converted.named_modules()
            if name
        ]
        with torch.no_grad():
            expected = [leaf for leaf in tree_leaves(self.converted(*inputs)) if isinstance(leaf, Tensor)]
        for handle in handles:
            handle.remove()
        codes = self.codes(*inputs)
        compared = {
            name: (output.numpy(), codes[name])
            for name, output in outputs.items()
            if name in codes and isinstance(output, Tensor)
        }
        counts = {name: int((one != other).sum()) for name, (one, other) in compared.items()}
        for index, (one, other) in enumerate(zip(expected, self.results(*inputs), strict=True)):
            same = (one.numpy() == other) | (np.abs(one.numpy() - other) <= float_tolerance)
            counts[f"result {index}"] = int((~same).sum())
        return {name: count for name, count in counts.items() if count}, len(compared)


def session_of(
    model: bytes, exact: bool | None = None, *, threads: int = 1, optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session on the CPU; with exact products on request, and by default where its own would saturate."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if plain_sessions_saturate() if exact is None else exact:
        options.add_session_config_entry(EXACT_PRODUCTS, "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
