"""``save`` and ``load``: a converted or a prepared model in one file."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.convert import unwrapped
from ..conversion.save_pretrained import replace_save_pretrained
from ..graph.float_structure import Record, record_of
from ..int8.integer_module import IntegerModule
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.sharding import sharded_parameter
from . import saved_file
from .checks import check_fits, check_layers, check_state
from .decoding import Decoder
from .encoding import Encoder, is_order
from .saved_file import SavedFileError
from .vocabulary import NotAllowedError, shortened


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a converted or a prepared model into one file, in safetensors' format, which :func:`load` reads.

    The file holds integer codes, scales and whatever else is tensors, and in its metadata the graph, the grids and the
    configuration; of a prepared model also what its observers have seen, so that training goes on as it would have.
    No code is in it, and nothing is pickled. The network's own code is not in it either: :func:`load` is given that.

    Args:
        model: from :func:`convert` or :func:`prepare`, or any module that holds such models. Of what ``torch.compile``
            or ``DistributedDataParallel`` made, the model inside is saved.
        path: what is there is replaced, once the file is written whole.

    Raises:
        TypeError: the model is neither converted nor prepared.
        ValueError: the model holds what a file cannot: a module, a hook or a method that came after :func:`prepare`, an
            object that is no value; the error names it.
        RuntimeError: parameters are split over ranks.
        ImportError: without safetensors (``pip install 'mlframework-quantization[saving]'``).
        OSError: the file cannot be written; what was at ``path`` is as it was.

    Example:
        >>> import tempfile, os
        >>> def network():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prepared = prepare(network(), QATConfig(), (torch.randn(1, 4),))
        >>> calibrate(prepared, [torch.randn(32, 4)])
        >>> int8_model = convert(prepared)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.safetensors")
        ...     save(int8_model, path)
        ...     again = load(path, network())
        >>> x = torch.randn(5, 4)
        >>> torch.equal(again(x), int8_model(x))
        True
    """
    write(model, path)


def write(
    model: nn.Module, path: str | os.PathLike[str], prefix: str = "", other: Mapping[str, Tensor] | None = None
) -> None:
    """:func:`save`, with a prefix to the names of tensors, and with other tensors, which loading ignores."""
    model = unwrapped(model)
    if not isinstance(model, nn.Module) or not any(map(_is_quantized, model.modules())):
        raise TypeError(f"model must be prepared or converted, got {type(model).__name__}: call prepare() or convert()")
    sharded = sharded_parameter(model)
    if sharded is not None:
        raise RuntimeError(f"model must hold whole parameters, got {sharded} split over ranks")
    encoder = Encoder(model, prefix)
    document = {
        "structure": encoder.structure,
        "modules": encoder.modules,
        "objects": encoder.objects,
        "records": encoder.records,
        "sources": encoder.sources,
        "tensors": {**encoder.tensor_entries, **{name: {} for name in other or {}}},
    }
    saved_file.write(path, document, {**encoder.tensors, **(other or {})})


def load(path: str | os.PathLike[str], network: nn.Module) -> nn.Module:
    """The model that :func:`save` wrote, made of a network that is built as the saved one was.

    Nothing is prepared, calibrated or converted, and no code comes from the file. A converted model computes what the
    saved one did, bit for bit, whatever weights the network has; a prepared one trains on as the saved one would have.

    A file holds a computation, not Python code: only calls from a fixed list run, of PyTorch's functions on tensors and
    of the network's own modules. Checksums find damage; they do not prove who made a file. Load files from those whose
    models you would run; for others, check their origin (signatures), as for any model.

    Args:
        path: of the file.
        network: the float network, made by the same code as the one that was prepared; with weights or, made under
            ``torch.device("meta")``, without. Its modules become the model's: go on with what is returned. Where it has
            tensors on a device, the model is there.

    Raises:
        TypeError: ``network`` is no module, or is prepared or converted.
        ValueError: the file is not one that :func:`save` wrote, is not whole, was changed, is of a version that is not
            known, or is of another network. The error says what and where, and nothing was changed.
        OSError: the file cannot be read.

    Example:
        >>> load("model.safetensors", nn.Linear(4, 2))
        Traceback (most recent call last):
        ...
        FileNotFoundError: [Errno 2] No such file or directory: 'model.safetensors'
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    own = dict(network.named_modules())
    if any(map(_is_quantized, own.values())):
        raise TypeError(f"network must be a float network, got a {type(network).__name__} with quantization in it")
    # Whoever loads to compute alone may train the model elsewhere.
    with _without_collections(), torch.inference_mode(False):
        return _loaded(os.fspath(path), saved_file.read_bytes(path), own)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Nothing that loading makes is garbage, and going through all that a process holds takes longer than loading."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _loaded(path: str, content: memoryview, own: Mapping[str, nn.Module]) -> nn.Module:
    try:
        document, tensors = saved_file.parts_of(path, content)
        decoder = _decoded(path, document, tensors, own)
    except SavedFileError:
        raise
    except NotAllowedError as error:
        raise SavedFileError(f"{path!r} says what a file may not say: {error}") from None
    except Exception as error:  # whatever comes of data that nobody has checked
        raise SavedFileError(f"{path!r}: its metadata is none that save() writes: {shortened(repr(error))}") from None
    model = decoder.model()
    if any(isinstance(module, IntegerModule) for module in decoder.modules):
        replace_save_pretrained(decoder.modules)
    return model


def _decoded(
    path: str, document: Mapping[str, Any], tensors: Mapping[str, Tensor], own: Mapping[str, nn.Module]
) -> Decoder:
    """The model beside the modules of the network, which have all that it takes."""
    structure: dict[str, Record] = {name: record_of(module) for name, module in own.items()}
    check_fits(path, document["structure"], structure)
    device = next((each.device for each in _tensors_of(own.values()) if not each.is_meta), None)
    if device is not None and device.type == "cpu":
        device = None
    said = document["tensors"]
    placed = {
        name: tensor if device is None and not said[name][1] else _placed(tensor, said[name][1], device)
        for name, tensor in tensors.items()
    }
    decoder = Decoder({**document, "structure": structure}, placed, own)
    check_layers(path, document["modules"], decoder.modules, decoder.states, placed)
    check_state(path, document["modules"], decoder.states, placed)
    decoder.make()
    return decoder


def _tensors_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def _placed(tensor: Tensor, entry: Mapping[str, Any], device: torch.device | None) -> Tensor:
    """A tensor on the device, where that is not the CPU, and as it lay."""
    strides = entry.get("strides")
    if strides is not None:
        if not is_order(strides, tensor.shape):
            raise NotAllowedError(f"a tensor of shape {tuple(tensor.shape)} may not have the strides {strides}")
        tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
    return tensor if device is None else tensor.to(device)


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, (IntegerModule, FakeQuantizeLayer))
