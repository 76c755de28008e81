"""Where two or three forms of a model agree, and where they part."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .saturation import EXACT_PRODUCTS


@dataclass(frozen=True)
class Difference:
    """What differs between two tensors, or between many pairs of them.

    ``largest`` is in steps of the grid where codes were compared, and in the values' own unit where floats were.
    ``ties`` counts indices (of ``argmax``, ``topk``, ``sort``) that are others, of equal values: either is right, and
    they are not among ``differing``.
    """

    elements: int = 0
    differing: int = 0
    largest: float = 0.0
    ties: int = 0

    @classmethod
    def between(cls, one: Tensor, other: Tensor, ties: Tensor | None = None) -> Difference:
        """Element by element; NaN agrees with NaN.

        Args:
            one, other: of one shape.
            ties: a mask of indices that are others, of equal values.

        Raises:
            ValueError: the shapes differ.
        """
        if one.shape != other.shape:
            raise ValueError(f"shapes must agree, got {tuple(one.shape)} and {tuple(other.shape)}")
        one, other = one.detach().cpu().double(), other.detach().cpu().double()
        differs = (one != other) & ~(one.isnan() & other.isnan())
        if ties is not None:
            differs &= ~ties.cpu()
        count = int(differs.sum())
        largest = float((one - other)[differs].abs().max()) if count else 0.0
        return cls(one.numel(), count, largest, 0 if ties is None else int(ties.sum()))

    def __add__(self, other: Difference) -> Difference:
        largest = max(self.largest, other.largest, key=lambda value: (math.isnan(value), value))
        ties = self.ties + other.ties
        return Difference(self.elements + other.elements, self.differing + other.differing, largest, ties)

    def __str__(self) -> str:
        notes = [f"by {self.largest:g}"] if self.differing else []
        notes += [f"{self.ties} ties"] if self.ties else []
        return f"{self.differing} of {self.elements}" + (f" ({', '.join(notes)})" if notes else "")


@dataclass(frozen=True)
class LayerComparison:
    """One layer, or one output of the model.

    Attributes:
        name: qualified name; ``output`` (``output 0``, ... where there are several) for what the model returns.
        kind: what computes it in the converted model.
        compared: ``"codes"`` or ``"floats"``.
        converted: the prepared model in evaluation against the converted one.
        exported: the converted model against the file in its engine; None without a file, or where the engine does
            not show this layer.
        exported_saturating: where ``exported`` was computed with exact products because ONNX Runtime's own saturate on
            this processor, the converted model against a session that was left to saturate; None elsewhere.
    """

    name: str
    kind: str
    compared: str
    converted: Difference
    exported: Difference | None = None
    exported_saturating: Difference | None = None

    @property
    def agrees(self) -> bool:
        """Whether nothing differs: of two sessions, where one of them was to be exact, in either. (Layers with int8
        activations have no exact integer products in ONNX Runtime and run on floats there; it is then the session left
        to saturate that can show that the file is right.)"""
        sessions = [session for session in (self.exported, self.exported_saturating) if session is not None]
        return self.converted.differing == 0 and (not sessions or any(each.differing == 0 for each in sessions))

    @property
    def saturates(self) -> bool:
        """Whether saturation takes ONNX Runtime further from the converted model than it is with exact products."""
        exact, plain = self.exported, self.exported_saturating
        if exact is None or plain is None:
            return False
        return plain.differing > exact.differing or plain.largest > exact.largest


@dataclass(frozen=True)
class ComparisonReport:
    """Layer by layer, in the order in which they run; ``str()`` is a table, :meth:`to_dict` plain data.

    Attributes:
        layers: and the model's results after them.
        engine: which ran the file, where there was one.
    """

    layers: tuple[LayerComparison, ...]
    engine: str = "ONNX Runtime"

    @property
    def agrees(self) -> bool:
        """Whether every layer agrees."""
        return all(layer.agrees for layer in self.layers)

    @property
    def saturates(self) -> bool:
        """Whether ONNX Runtime, left to saturate as it does by default on this processor, gives something else."""
        return any(layer.saturates for layer in self.layers)

    @property
    def saturation(self) -> str | None:
        """What saturation does to the file on this processor, in words; None where ONNX Runtime is exact by itself, or
        no file was run."""
        if all(layer.exported_saturating is None for layer in self.layers):
            return None
        if not self.saturates:
            return "ONNX Runtime's 16-bit sums are subject to saturation on this processor; these batches met none"
        # Of layers that return floats, some may differ for other reasons: they count where no code tells.
        kind = "codes" if any(layer.saturates and layer.compared == "codes" for layer in self.layers) else "floats"
        differences = [layer.exported_saturating for layer in self.layers if layer.compared == kind]
        total = sum((part for part in differences if part is not None), Difference())
        return (
            f"ONNX Runtime's plain session differs in {total.differing} of {total.elements} {kind}, by saturation of "
            "16-bit sums on this processor. Remedies: QATConfig(reduce_range=True), which keeps weights within 7 bits, "
            f"or the session option {EXACT_PRODUCTS}=1"
        )

    @property
    def first_difference(self) -> LayerComparison | None:
        """The first layer where the models part; what differs after it may only follow from it."""
        return next((layer for layer in self.layers if not layer.agrees), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as :mod:`json` writes it."""
        first = self.first_difference
        return {
            "agrees": self.agrees,
            "engine": self.engine,
            "first_difference": None if first is None else first.name,
            "saturation": self.saturation,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        columns: list[tuple[str, list[Difference | None]]] = [
            ("prepared / converted", [layer.converted for layer in self.layers]),
            (f"converted / {self.engine}", [layer.exported for layer in self.layers]),
            ("the same, saturating", [layer.exported_saturating for layer in self.layers]),
        ]
        columns = [column for column in columns if any(part is not None for part in column[1])]
        rows: list[tuple[str, ...]] = [("layer", "kind", "compared", *(header for header, _ in columns))]
        for index, layer in enumerate(self.layers):
            differences = ("-" if column[index] is None else str(column[index]) for _, column in columns)
            rows.append((layer.name, layer.kind, layer.compared, *differences))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        first = self.first_difference
        lines.append("nothing differs" if first is None else f"the models part at {first.name}")
        if self.saturation is not None:
            lines.append(self.saturation)
        return "\n".join(lines)
