"""Measurements kept in a file, so that a long analysis goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..qat.fake_quantize_layer import FakeQuantizeLayer


class Checkpoint:
    """A JSON file of results by key; without a path, they are kept in memory alone.

    The file also holds what the results are of, hashed, and the version that made them; it is refused where either is
    another.

    Args:
        path: of the file, which may not exist yet.
        subject: what the results are of: names of its parts, with a hash of each.
        title: of the subject, for messages.

    Raises:
        ValueError: the file is no such file, or its results are of something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None, subject: Mapping[str, str], title: str) -> None:
        self.path = None if path is None else Path(path)
        self.subject = {**subject, "version": importlib.metadata.version("mlframework-quantization")}
        self.title = title
        self.results: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            self.results = self._read(self.path)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            data = json.loads(path.read_text())
            subject, title, results = data["subject"], data["title"], data["results"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"checkpoint {str(path)!r} must be a file of this analysis, got another one") from error
        differing = [part for part in self.subject if subject.get(part) != self.subject[part]]
        if differing:
            raise ValueError(
                f"checkpoint {str(path)!r} is of {title} with other {', '.join(differing)} than {self.title} here: "
                "give another path, or remove the file"
            )
        return dict(results)

    def get(self, key: str) -> Any:
        """A result, or None."""
        return self.results.get(key)

    def put(self, key: str, result: Any) -> None:
        """Keeps a result, and writes the file: whole, or not at all."""
        self.results[key] = result
        if self.path is None:
            return
        data = {"title": self.title, "subject": self.subject, "results": self.results}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(data))
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)


def fingerprint_of_model(model: nn.Module) -> str:
    """A hash of a prepared model: the classes of its modules, its state, and the grids of its nodes."""
    modules = [f"{name} {type(module).__qualname__}" for name, module in model.named_modules()]
    grids = [f"{name} {node.scheme}" for name, node in model.named_modules() if isinstance(node, FakeQuantizeLayer)]
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return _hash([*modules, *grids, state])


def fingerprint_of_values(values: Iterable[Any]) -> str:
    """A hash of tensors, arrays and plain values, in whatever containers."""
    return _hash(list(values))


def qualified_name(function: Any) -> str:
    """Module and name of a function, or of the class of a callable."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _hash(value: Any) -> str:
    digest = hashlib.sha256()
    leaves, structure = tree_flatten(value)
    digest.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            bytes_of = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(bytes_of.numpy().tobytes())
        elif hasattr(leaf, "tobytes"):  # NumPy's: of a large array, repr() leaves out most
            digest.update(f"{leaf.dtype} {leaf.shape}".encode())
            digest.update(leaf.tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
