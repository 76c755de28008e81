"""``assign_bits``: a width for every layer, by an integer programme over what a sensitivity analysis measured."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from ..qat.config import QATConfig, Selector
from ..tables import html_table, text_table
from ..targets import TARGETS
from .measures import decibels
from .optional import required
from .sensitivity_report import SensitivityReport
from .solver_output import without_solver_output

FLOAT_BITS = 32
_SCALE_BYTES = 4  # float32
_RANGE_OF_COSTS = 1e6  # what the largest is scaled to: the solver's tolerances are absolute, about 1e-6


class Choice(NamedTuple):
    """One width of one layer; ``bits`` is None for float."""

    bits: int | None
    cost: float
    weights: int
    file_bytes: int

    @property
    def weight_bits(self) -> int:
        """What all the layer's weights take, packed."""
        return self.weights * (FLOAT_BITS if self.bits is None else self.bits)


@dataclass(frozen=True)
class BitAssignment:
    """A width for every layer; ``str()`` is a table.

    Attributes:
        choices: by the layer's name, in the order in which they run.
        overrides: what each quantized layer is to be prepared with, for ``QATConfig(overrides=...)``. The names are
            escaped: in a configuration they are shell patterns.
        skip: the layers to leave float, for ``QATConfig(skip=...)``, escaped as well.
        expected: what the outputs are expected to lose, as the sum of what the layers cost alone: a relative squared
            error, or, where the analysis had a loss, the loss.
        has_loss: whether it is a loss.
        average_bits: of the weights, float ones counted as 32.
        file_bytes: of all parameters, as the target's files store them.
        notes: what the target makes of it.
    """

    choices: Mapping[str, Choice]
    overrides: dict[str | type[Any], QATConfig] = field(repr=False)
    skip: tuple[str, ...]
    expected: float
    has_loss: bool
    average_bits: float
    file_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def bits(self) -> dict[str, int | None]:
        """The width of each layer by name; None is float."""
        return {name: choice.bits for name, choice in self.choices.items()}

    def configured(self, config: QATConfig) -> QATConfig:
        """A configuration with these widths for the layers measured, and in all else as it is.

        What it says of a layer in ``overrides`` by name or pattern stays, but for the width; overrides by type are for
        other layers.

        Example:
            >>> prepared = prepare(nn.Linear(8, 2), QATConfig(), (torch.randn(1, 8),))
            >>> calibrate(prepared, [torch.randn(32, 8)])
            >>> assignment = assign_bits(
            ...     analyze_sensitivity(prepared, [torch.randn(8, 8)], activations=False), average_bits=4
            ... )
            >>> assignment.configured(QATConfig()).for_layer("", nn.Linear(8, 2)).weight_bits
            4
        """
        overrides: dict[Selector, QATConfig] = {}
        for name, bits in self.bits.items():
            if bits is not None:
                named = (
                    own for key, own in config.overrides.items() if isinstance(key, str) and fnmatchcase(name, key)
                )
                base = next(named, config)
                overrides[glob.escape(name)] = replace(base, weight_bits=bits, overrides={}, skip=())
        others = {key: own for key, own in config.overrides.items() if key not in overrides}
        return replace(config, overrides={**overrides, **others}, skip=(*config.skip, *self.skip))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as :mod:`json` writes it."""
        return {
            "bits": self.bits,
            "expected": self.expected,
            "average_bits": self.average_bits,
            "file_bytes": self.file_bytes,
            "notes": list(self.notes),
        }

    @property
    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                name or "(the model)",
                "float" if choice.bits is None else str(choice.bits),
                f"{choice.weights:,}",
                f"{choice.cost:.3g}",
            )
            for name, choice in self.choices.items()
        ]

    @property
    def _summary(self) -> list[str]:
        expected = f"loss {self.expected:.5g}" if self.has_loss else f"{decibels(self.expected):.1f} dB"
        size = f"{self.file_bytes:,} bytes in a file"
        return [f"{self.average_bits:.2f} bits a weight, {size}; expected: {expected}", *self.notes]

    def __str__(self) -> str:
        return "\n".join([text_table(_HEADER, self._rows, numbers=(1, 2, 3)), *self._summary])

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows, numbers=(1, 2, 3), notes=self._summary)


_HEADER = ("layer", "bits", "weights", "cost")


def assign_bits(
    sensitivity: SensitivityReport,
    *,
    average_bits: float | None = None,
    model_bytes: int | None = None,
    max_loss: float | None = None,
) -> BitAssignment:
    r"""The widths of weights with the least loss within a size, or of the least size within a loss.

    Every layer :math:`l` gets one width :math:`b` of those measured, or stays float. What it costs,
    :math:`c_{lb}`, is what the outputs lose where it alone is quantized (float costs nothing); costs of several layers
    are taken to add up. With :math:`x_{lb} \in \{0, 1\}`, :math:`\sum_b x_{lb} = 1`, the programme is

    .. math:: \min \sum_{l,b} c_{lb} x_{lb} \quad\text{subject to}\quad \sum_{l,b} n_l\, b\, x_{lb} \le B \sum_l n_l

    for ``average_bits`` :math:`B` and :math:`n_l` weights; for ``model_bytes`` the sum is that of bytes in the target's
    file; for ``max_loss`` sum and objective change places. SciPy's ``milp`` solves it exactly. The idea of additive
    sensitivities is that of HAWQ-V3 (Yao et al. 2021) and of ZeroQ's Pareto frontier (Cai et al. 2020); the costs here
    are measured.

    Args:
        sensitivity: of :func:`analyze_sensitivity`, best with ``activations=False``, so that costs are those of weights
            alone, and on as many batches as there is time for.
        average_bits: at most so many bits to a weight, on average over all weights of the layers measured; float
            counts as 32.
        model_bytes: at most so many bytes for all parameters and buffers, as the target's file stores them; its
            description of the graph comes on top. An engine without kernels for narrow codes stores these as int8. A
            weight that several layers share counts for each: its codes are stored with the scales of each.
        max_loss: the expected loss at most: what the analysis' loss may be, or without one the relative squared error
            of the outputs (0.01 are 20 dB).

    Raises:
        TypeError: ``sensitivity`` is no report, or a limit is no number.
        ValueError: not exactly one of the three limits is given, or no assignment keeps it.
        ImportError: SciPy is not installed.

    Example:
        >>> network = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> prepared = prepare(network, QATConfig(), (torch.randn(1, 8),))
        >>> calibrate(prepared, [torch.randn(64, 8)])
        >>> sensitivity = analyze_sensitivity(prepared, [torch.randn(64, 8)], (8, 4, 3, 2), activations=False)
        >>> assignment = assign_bits(sensitivity, average_bits=5)
        >>> assignment.average_bits <= 5
        True
        >>> prepared = prepare(network, assignment.configured(QATConfig()), (torch.randn(1, 8),))
    """
    if not isinstance(sensitivity, SensitivityReport):
        raise TypeError(f"sensitivity must be a SensitivityReport, got {type(sensitivity).__name__}")
    limits = {"average_bits": average_bits, "model_bytes": model_bytes, "max_loss": max_loss}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(limits)} must be given, got {', '.join(given) or 'none'}")
    ((name, limit),) = given.items()
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise TypeError(f"{name} must be a number, got {limit!r}")
    choices = _choices(sensitivity)
    start = sensitivity.reference_loss or 0.0
    if average_bits is not None:
        weights = sum(options[0].weights for options in choices.values())
        picked = _solved(choices, "cost", "weight_bits", average_bits * weights, f"average_bits={limit}", 1 / weights)
    elif model_bytes is not None:
        left = model_bytes - sensitivity.other_bytes
        picked = _solved(
            choices, "cost", "file_bytes", left, f"model_bytes={limit}", 1.0, beside=sensitivity.other_bytes
        )
    else:
        assert max_loss is not None
        picked = _solved(choices, "weight_bits", "cost", max_loss - start, f"max_loss={limit}", 1.0, beside=start)
    return _assignment(sensitivity, picked, start)


def _choices(sensitivity: SensitivityReport) -> dict[str, list[Choice]]:
    """What every layer may be, float last."""
    stored = TARGETS[sensitivity.target].stored_bits
    choices: dict[str, list[Choice]] = {}
    for layer in sensitivity.layers:
        cost = layer.alone.relative_error
        if layer.alone.loss is not None and sensitivity.reference_loss is not None:
            cost = layer.alone.loss - sensitivity.reference_loss
        size = -(-layer.weights * max(layer.bits, stored) // 8) + layer.scales * _SCALE_BYTES
        choices.setdefault(layer.name, []).append(Choice(layer.bits, cost, layer.weights, size))
    for options in choices.values():
        weights = options[0].weights
        options.append(Choice(None, 0.0, weights, weights * FLOAT_BITS // 8))
    return choices


def _solved(
    choices: Mapping[str, list[Choice]],
    objective: str,
    limited: str,
    limit: float,
    what: str,
    unit: float,
    beside: float = 0.0,
) -> dict[str, Choice]:
    """One choice for each layer: the least sum of ``objective`` with a sum of ``limited`` within ``limit``.

    Args:
        what: the limit as it was asked for; ``unit`` and ``beside`` turn a sum into its terms, for messages.
    """
    optimize, sparse = required("scipy.optimize", "assign_bits"), required("scipy.sparse", "assign_bits")
    options = [choice for layer in choices.values() for choice in layer]
    layer_of = [index for index, layer in enumerate(choices.values()) for _ in layer]
    least = sum(min(getattr(choice, limited) for choice in layer) for layer in choices.values())
    if least > limit:
        raise ValueError(f"{what} cannot be kept: the least with these widths is {least * unit + beside:.6g}")
    goals, amounts = ([float(getattr(choice, part)) for choice in options] for part in (objective, limited))
    goals, _ = _scaled(goals)
    amounts, factor = _scaled(amounts)
    one_each = sparse.csr_array(
        ([1.0] * len(options), (layer_of, range(len(options)))), shape=(len(choices), len(options))
    )
    with without_solver_output():
        solution = optimize.milp(
            goals,
            integrality=[1] * len(options),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint([amounts], -float("inf"), limit * factor),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if solution.x is None:
        raise ValueError(f"{what} could not be solved: {solution.message}")
    picked = [choice for choice, taken in zip(options, solution.x, strict=True) if taken > 0.5]
    return dict(zip(choices, picked, strict=True))


def _scaled(values: list[float]) -> tuple[list[float], float]:
    """The values times a factor that brings the largest to what a solver with absolute tolerances should see."""
    largest = max(map(abs, values), default=0.0)
    factor = _RANGE_OF_COSTS / largest if largest > 0 else 1.0
    return [value * factor for value in values], factor


def _assignment(sensitivity: SensitivityReport, picked: Mapping[str, Choice], start: float) -> BitAssignment:
    weights = sum(choice.weights for choice in picked.values())
    stored = TARGETS[sensitivity.target].stored_bits
    notes: tuple[str, ...] = ()
    if any(choice.bits is not None and choice.bits < stored for choice in picked.values()):
        notes = (
            f"{sensitivity.target} has no kernels for weights below {stored} bits: codes of fewer are stored and "
            f"multiplied as int{stored}, and save neither bytes nor time there",
        )
    return BitAssignment(
        dict(picked),
        {
            glob.escape(name): replace(sensitivity.configs[name], weight_bits=choice.bits, overrides={}, skip=())
            for name, choice in picked.items()
            if choice.bits is not None
        },
        tuple(glob.escape(name) for name, choice in picked.items() if choice.bits is None),
        start + sum(choice.cost for choice in picked.values()),
        sensitivity.reference_loss is not None,
        sum(choice.weight_bits for choice in picked.values()) / weights,
        sensitivity.other_bytes + sum(choice.file_bytes for choice in picked.values()),
        notes,
    )
