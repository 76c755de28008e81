"""An exported file in ONNX Runtime, with what its layers give."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from .exported_outputs import ExportedOutputs, tensors_of
from .saturation import EXACT_PRODUCTS, plain_sessions_saturate

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]

Providers = Sequence[str | tuple[str, Mapping[str, Any]]]

_CPU = "CPUExecutionProvider"
_INT8_ACTIVATIONS = "session.qdqisint8allowed"


class OnnxSession:
    """Runs a file that :func:`export_onnx` wrote, optimized as ONNX Runtime does by default.

    To let inner values be seen is all that is done to it; ONNX Runtime fuses the same operators with them as without.

    Args:
        path: the file.
        layers: names of the layers to see; those that the file does not show are left out.
        options: of the session, used as they are. Without them, int8 activations, which other engines take, are allowed
            to run on integers.
        providers: what executes it; the CPU by default.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        FileNotFoundError: there is no such file.
    """

    engine: ClassVar = "ONNX Runtime"

    def __init__(
        self,
        path: str | os.PathLike[str],
        layers: Collection[str],
        options: onnxruntime.SessionOptions | None = None,
        providers: Providers | None = None,
    ) -> None:
        onnx, runtime = _import_engine()
        model = onnx.load(os.fspath(path))
        self.results = [value.name for value in model.graph.output]
        values = {value for node in model.graph.node for value in node.output}
        self.layers = [name for name in layers if name in values and name not in self.results]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.layers)
        self._model = model.SerializeToString()
        self._has_options = options is not None
        self._providers = [_CPU] if providers is None else providers
        if options is None:
            options = runtime.SessionOptions()
            options.add_session_config_entry(_INT8_ACTIVATIONS, "1")
        self._start(options)

    def _start(self, options: onnxruntime.SessionOptions) -> None:
        self._is_exact = _entry(options, EXACT_PRODUCTS) == "1"
        # Where a provider fails, it would fall back to the CPU and only print so.
        self.session = _import_engine()[1].InferenceSession(self._model, options, self._providers, enable_fallback=0)

    @property
    def saturates(self) -> bool:
        """Whether it multiplies on a CPU that gives wrong sums, and was not told to be exact."""
        return not self._is_exact and self.session.get_providers() == [_CPU] and plain_sessions_saturate()

    def with_exact_products(self) -> OnnxSession:
        """One of the same file and options, in which the products are exact.

        Layers with int8 activations compute in float there: ONNX Runtime has no product of int8 and uint8, and raises
        to uint8 only what is not looked at.

        Raises:
            ValueError: the file does not load that way, as those of earlier versions of this library.
        """
        # A session returns a copy of its options, which they do not offer themselves; the caller's stay as they are.
        options = self.session.get_session_options() if self._has_options else _import_engine()[1].SessionOptions()
        options.add_session_config_entry(EXACT_PRODUCTS, "1")
        if _entry(options, _INT8_ACTIVATIONS) == "1":
            options.add_session_config_entry(_INT8_ACTIVATIONS, "0")
        options.optimized_model_filepath, options.enable_profiling = "", False  # those of the first session stay
        exact = copy.copy(self)
        try:
            exact._start(options)
        except Exception as error:  # of ONNX Runtime, whose errors have no common base
            raise ValueError(
                f"path must load with {EXACT_PRODUCTS}=1, without which this processor's products saturate; "
                f"a file that does not was written by an earlier version of export_onnx: {error}"
            ) from error
        return exact

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedOutputs:
        """Runs the file on the arguments of a call of ``model``."""
        tensors = tensors_of(model, args, kwargs)
        inputs = self.session.get_inputs()
        if len(inputs) != len(tensors):
            raise ValueError(
                f"path must be of the same network as model: it takes {len(inputs)} tensors, a batch has {len(tensors)}"
            )
        feed = {value.name: tensor.detach().cpu().numpy() for value, tensor in zip(inputs, tensors, strict=True)}
        outputs = [torch.from_numpy(array) for array in self.session.run([*self.layers, *self.results], feed)]
        return ExportedOutputs(
            dict(zip(self.layers, outputs[: len(self.layers)], strict=True)), outputs[len(self.layers) :]
        )


def check_session_arguments(path: Any, session_options: Any, providers: Any) -> None:
    """Refuses options and providers that no session can be made with, before anything runs.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        TypeError: ``session_options`` are not ONNX Runtime's, or ``providers`` is no sequence of names, or of names
            with their options.
        ValueError: there is no file to use them for, or a provider is not available.
    """
    if session_options is None and providers is None:
        return
    if path is None:
        raise ValueError("session_options and providers need a file to run, got path=None")
    runtime = _import_engine()[1]
    if session_options is not None and not isinstance(session_options, runtime.SessionOptions):
        raise TypeError(f"session_options must be onnxruntime.SessionOptions, got {type(session_options).__name__}")
    if providers is None:
        return
    if isinstance(providers, str) or not isinstance(providers, Sequence):
        raise TypeError(f"providers must be a list of execution providers, got {providers!r}")
    available = runtime.get_available_providers()
    for provider in providers:
        name = provider[0] if isinstance(provider, tuple) and len(provider) == 2 else provider
        if not isinstance(name, str):
            raise TypeError(f"providers must hold names, or tuples of a name and its options, got {provider!r}")
        if name not in available:
            raise ValueError(f"providers must be available in this onnxruntime ({', '.join(available)}), got {name!r}")


def _import_engine() -> tuple[Any, Any]:
    """onnx and onnxruntime."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"path needs onnx and onnxruntime ({error}): pip install 'mlframework-quantization[onnx]'"
        ) from error
    return onnx, onnxruntime


def _entry(options: onnxruntime.SessionOptions, key: str) -> str | None:
    """A configuration entry; None where there is none, for which ONNX Runtime raises an error."""
    try:
        return str(options.get_session_config_entry(key))
    except RuntimeError:
        return None
