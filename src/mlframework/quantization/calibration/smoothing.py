"""``smooth_activations``: SmoothQuant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .layers import quantized_layers
from .migration import Edge, edges_of, input_channels, measure_extents, migrate, powers_of_two
from .own_parameters import unchanged_on_error
from .ranges import measure_ranges
from .report import MethodReport
from .runs import kept, nodes_of


def smooth_activations(model: nn.Module, batches: Iterable[Any], alpha: float = 0.5) -> MethodReport:
    r"""Moves what a few channels of activations have too much of into the weights that read them.

    In transformers, single channels after a normalization are tens of times larger than the others, which then share
    what is left of one 8-bit grid. Where quantized layers alone read what a LayerNorm or an RMSNorm with an elementwise
    affine gives, its weight and bias are divided by a number for each channel and their weights multiplied by it
    (Xiao et al. 2023, arXiv:2211.10438, equation 4):

    .. math:: s_c = \max |x_c|^\alpha / \max |W_c|^{1 - \alpha}

    The numbers are rounded to powers of two, so that the float function stays the same bit for bit; it is compared on
    the first batch, and a normalization that does not keep it is left as it was. Where something else reads the
    normalized values, too (a residual sum after it, as in BERT), scales cannot move. Between two layers it is
    :func:`equalize` that moves them.

    Args:
        model: prepared; changed in place, and calibrated anew. Parameters that change become the model's own, and the
            float model keeps its own: make optimizers afterwards.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        alpha: how much of the difference between channels goes into the weights, from 0 to 1.

    Returns:
        By the name of each normalization.

    Raises:
        TypeError: a batch does not fit the model's forward, or ``batches`` is itself a batch.
        ValueError: the model is not prepared, there are no batches, or ``alpha`` is out of range. The model is then as
            it was.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        >>> prepared = prepare(model, QATConfig(), (torch.randn(1, 8),))
        >>> print(smooth_activations(prepared, [torch.randn(32, 8)]))
        smooth_activations: 1 changed
    """
    batches = kept(batches)
    with unchanged_on_error(model):
        report = smoothed(model, batches, alpha)
        measure_ranges(model, batches)
    return report


def smoothed(model: nn.Module, batches: Iterable[Any], alpha: float = 0.5) -> MethodReport:
    """:func:`smooth_activations` without measuring ranges afterwards."""
    nodes_of(model)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be a number from 0 to 1, got {alpha!r}")
    batches = kept(batches)
    report = MethodReport("smooth_activations")
    layers = quantized_layers(model, batches[0])
    edges = edges_of(model, layers, nn.Module, report)
    measure_extents(model, edges, batches)
    factors = {edge: powers_of_two(_factor(edge, edge.extents, alpha)) for edge in edges if edge.extents is not None}
    migrate(model, layers, factors, batches[0], report)
    return report


def _factor(edge: Edge, extents: Tensor, alpha: float) -> Tensor:
    """What the activation is multiplied by: 1 / s."""
    weights = torch.stack([input_channels(reader).abs().amax((0, 1, 3)) for reader in edge.readers]).amax(0)
    factor = weights ** (1 - alpha) / extents**alpha
    return torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)
