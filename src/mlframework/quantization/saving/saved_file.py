"""A file in safetensors' format: tensors, and in its metadata a document that says what they make up.

Whatever the file holds is in a digest, a tensor's values in one of their own, so that no change goes unseen.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..replaced_file import replaced_file

FORMAT_VERSION = 1

_DOCUMENT = "mlframework_quantization"
_DIGEST = "mlframework_quantization_sha256"
_LENGTH = 8  # bytes that say how long the header is

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SavedFileError(ValueError):
    """A file that is not what :func:`save` has written, or no longer; with what and where."""


def write(path: str | os.PathLike[str], document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a file in the place of what is there, whole or not at all.

    Args:
        path: of the file.
        document: of what JSON knows; under ``"tensors"`` what is to be said of each, as a dictionary.
        tensors: by name, of :data:`DTYPES`.

    Raises:
        ImportError: without safetensors.
        OSError: it cannot be written; what was there is as it was.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(
            f"save needs safetensors ({error}): pip install 'mlframework-quantization[saving]'"
        ) from error
    stored = _unshared({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    entries = {
        name: [_digest(NAMES[tensor.dtype], list(tensor.shape), _bytes_of(tensor)), document["tensors"][name]]
        for name, tensor in stored.items()
    }
    text = json.dumps({**document, "version": FORMAT_VERSION, "tensors": entries}, separators=(",", ":"))
    content = save(stored, _metadata(text))
    with replaced_file(path) as file:
        file.write(content)


def read_bytes(path: str | os.PathLike[str]) -> memoryview:
    """All of a file.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = bytearray(os.fstat(file.fileno()).st_size)
        return memoryview(content)[: file.readinto(content)]


def parts_of(name: str, content: memoryview) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document of a file, and its tensors.

    Raises:
        SavedFileError: it is no such file, of another version, or was changed.
    """
    try:
        header, data = _header(content)
        entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
        spans = {key: _span(key, entry) for key, entry in entries.items()}
        _check_spans(spans, len(data))
    except _NotWholeError as error:
        raise SavedFileError(f"{name!r} must be a whole file in safetensors' format: {error}") from None
    document = _document(name, header.get("__metadata__"))
    expected = document["tensors"]
    for key in (*expected, *entries):
        if (key in expected) is not (key in entries):
            raise SavedFileError(f"{name!r}: {key} {'is missing' if key in expected else 'is not expected'}")
    tensors = {key: _tensor(data, begin, entries[key]) for key, (begin, _) in spans.items()}
    for key, (begin, end) in spans.items():
        if _digest(entries[key]["dtype"], entries[key]["shape"], data[begin:end]) != expected[key][0]:
            raise SavedFileError(f"{name!r}: the values of {key} were changed since it was written")
    return document, tensors


class _NotWholeError(Exception):
    """Bytes that are not in safetensors' format."""


def _header(content: memoryview) -> tuple[dict[str, Any], memoryview]:
    if len(content) < _LENGTH:
        raise _NotWholeError(f"it has {len(content)} bytes")
    end = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    if end > len(content):
        raise _NotWholeError(f"its header must end at byte {end}, and it has {len(content)}")
    if end % _LENGTH:
        raise _NotWholeError(f"its header must end at a multiple of {_LENGTH} bytes, got {end}")
    try:
        header = json.loads(bytes(content[_LENGTH:end]), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise _NotWholeError(f"its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise _NotWholeError("its header is no JSON object")
    return header, content[end:]


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header: of two values of one name another reader may take the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _span(name: str, entry: Any) -> tuple[int, int]:
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = 1
        for size in shape:
            if type(size) is not int or size < 0:
                raise ValueError(size)
            count *= size
        size = dtype.itemsize
        if type(begin) is not int or type(end) is not int or begin < 0 or end - begin != count * size or begin % size:
            raise ValueError(entry)
    except (KeyError, TypeError, ValueError):
        raise _NotWholeError(f"its entry of {name} is none") from None
    return begin, end


def _check_spans(spans: Mapping[str, tuple[int, int]], length: int) -> None:
    """One begins where another ends, from the first byte to the last."""
    reached = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != reached:
            raise _NotWholeError(f"{name} must begin at byte {reached} of the tensors, got {begin}")
        reached = end
    if reached != length:
        raise _NotWholeError(f"its tensors must have {reached} bytes, got {length}")


def _tensor(data: memoryview, begin: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    # A storage of its own, so that the tensor is saved and copied without the others.
    found = torch.frombuffer(data, dtype=dtype, count=count, offset=begin)
    return found if len(shape) == 1 else found.view(shape)


def _document(path: str, metadata: Any) -> dict[str, Any]:
    text = metadata.get(_DOCUMENT) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise SavedFileError(f"{path!r} must be a file that save() wrote, got none with {_DOCUMENT!r} in its metadata")
    try:
        document = json.loads(text)
        version = document["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise SavedFileError(f"{path!r}: its metadata {_DOCUMENT!r} was changed, and does not read") from None
    if type(version) is not int or version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise SavedFileError(
            f"{path!r} must be of format {FORMAT_VERSION}, got {version!r}"
            f"{', which a newer version of this library wrote' if newer else ''}"
        )
    if metadata != _metadata(text):
        raise SavedFileError(f"{path!r}: its metadata {_DOCUMENT!r} was changed since it was written")
    return document  # type: ignore[no-any-return]


def _metadata(document: str) -> dict[str, str]:
    return {"format": "pt", _DOCUMENT: document, _DIGEST: hashlib.sha256(document.encode()).hexdigest()}


def _digest(dtype: str, shape: list[int], values: Any) -> int:
    """It tells changes, and no authors: whoever knows the format can write another one."""
    return zlib.crc32(values, zlib.crc32(f"{dtype} {shape}".encode()))


def _bytes_of(tensor: Tensor) -> Any:
    length = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * length).from_address(tensor.data_ptr()) if length else b""


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with storages of their own, which the format asks for."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        is_part = storage.nbytes() != tensor.numel() * tensor.element_size() or storage.data_ptr() in seen
        found[name] = tensor.clone() if is_part else tensor
        seen.add(storage.data_ptr())
    return found
