"""Where two or three forms of a model agree, and where they part."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """What differs between two tensors, or between many pairs of them.

    ``largest`` is in steps of the grid where codes were compared, and in the values' own unit where floats were.
    """

    elements: int = 0
    differing: int = 0
    largest: float = 0.0

    @classmethod
    def between(cls, one: Tensor, other: Tensor) -> Difference:
        """Element by element; NaN agrees with NaN.

        Raises:
            ValueError: the shapes differ.
        """
        if one.shape != other.shape:
            raise ValueError(f"shapes must agree, got {tuple(one.shape)} and {tuple(other.shape)}")
        one, other = one.detach().cpu().double(), other.detach().cpu().double()
        differs = (one != other) & ~(one.isnan() & other.isnan())
        count = int(differs.sum())
        largest = float((one - other)[differs].abs().max()) if count else 0.0
        return cls(one.numel(), count, largest)

    def __add__(self, other: Difference) -> Difference:
        largest = max(self.largest, other.largest, key=lambda value: (math.isnan(value), value))
        return Difference(self.elements + other.elements, self.differing + other.differing, largest)

    def __str__(self) -> str:
        return f"{self.differing} of {self.elements}" + (f" (by {self.largest:g})" if self.differing else "")


@dataclass(frozen=True)
class LayerComparison:
    """One layer, or one output of the model.

    Attributes:
        name: qualified name; ``output`` (``output 0``, ... where there are several) for what the model returns.
        kind: what computes it in the converted model.
        compared: ``"codes"`` or ``"floats"``.
        converted: the prepared model in evaluation against the converted one.
        onnx: the converted model against the file in ONNX Runtime; None without a file, or where the file does not
            show this layer.
    """

    name: str
    kind: str
    compared: str
    converted: Difference
    onnx: Difference | None = None

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return self.converted.differing == 0 and (self.onnx is None or self.onnx.differing == 0)


@dataclass(frozen=True)
class ComparisonReport:
    """Layer by layer, in the order in which they run; ``str()`` is a table, :meth:`to_dict` plain data."""

    layers: tuple[LayerComparison, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing differs anywhere."""
        return all(layer.agrees for layer in self.layers)

    @property
    def first_difference(self) -> LayerComparison | None:
        """The first layer where the models part; what differs after it may only follow from it."""
        return next((layer for layer in self.layers if not layer.agrees), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as :mod:`json` writes it."""
        first = self.first_difference
        return {
            "agrees": self.agrees,
            "first_difference": None if first is None else first.name,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "kind", "compared", "prepared / converted", "converted / ONNX Runtime")
        ]
        for layer in self.layers:
            onnx = "-" if layer.onnx is None else str(layer.onnx)
            rows.append((layer.name, layer.kind, layer.compared, str(layer.converted), onnx))
        if all(layer.onnx is None for layer in self.layers):
            rows = [row[:-1] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        first = self.first_difference
        lines.append("nothing differs" if first is None else f"the models part at {first.name}")
        return "\n".join(lines)
