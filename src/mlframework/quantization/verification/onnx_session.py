"""An exported file in ONNX Runtime, with what its layers give."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class ExportedOutputs(NamedTuple):
    """What the layers give, by name (of one called several times, the last), and what the model returns (None where
    there is no file)."""

    layers: dict[str, Tensor]
    results: list[Tensor] | None


class OnnxSession:
    """Runs a file that :func:`export_onnx` wrote, on the CPU, optimized as ONNX Runtime does by default.

    To let inner values be seen is all that is done to it; ONNX Runtime fuses the same operators with them as without.

    Args:
        path: the file.
        layers: names of the layers to see; those that the file does not show are left out.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str], layers: Collection[str]) -> None:
        try:
            import onnx
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError(
                f"onnx_path needs onnx and onnxruntime ({error}): pip install 'mlframework-quantization[onnx]'"
            ) from error
        proto = onnx.load(os.fspath(path))
        self.results = [value.name for value in proto.graph.output]
        values = {value for node in proto.graph.node for value in node.output}
        self.layers = [name for name in layers if name in values and name not in self.results]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.layers)
        options = onnxruntime.SessionOptions()
        # int8 activations, which other engines take, run on integers only if they are allowed to.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        self.session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedOutputs:
        """Runs the file on the arguments of a call of ``model``."""
        arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        tensors = [leaf for leaf in tree_leaves(dict(arguments)) if isinstance(leaf, Tensor)]
        inputs = self.session.get_inputs()
        if len(inputs) != len(tensors):
            raise ValueError(
                f"onnx_path must be of the same network as model: it takes {len(inputs)} tensors, "
                f"a batch has {len(tensors)}"
            )
        feed = {value.name: tensor.detach().cpu().numpy() for value, tensor in zip(inputs, tensors, strict=True)}
        outputs = [torch.from_numpy(array) for array in self.session.run([*self.layers, *self.results], feed)]
        return ExportedOutputs(
            dict(zip(self.layers, outputs[: len(self.layers)], strict=True)), outputs[len(self.layers) :]
        )
