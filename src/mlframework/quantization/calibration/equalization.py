"""``equalize``: cross-layer equalization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..qat.qat_module_wrapper import QATModuleWrapper
from .layers import QuantizedLayer, quantized_layers
from .migration import Edge, edges_of, input_channels, measure_extents, migrate, powers_of_two
from .own_parameters import unchanged_on_error
from .ranges import measure_ranges
from .report import MethodReport
from .runs import kept, nodes_of

_SWEEPS = 10


def equalize(model: nn.Module, batches: Iterable[Any]) -> MethodReport:
    r"""Scales the channels between two layers so that those which share a grid have ranges alike.

    Where one layer alone reads what another makes, through a ReLU or nothing, channel c of the value is multiplied by
    :math:`d_c` in the first (in the weight and bias of its batch normalization, where it has one) and divided by it in
    the second; the float function is the same (Nagel et al. 2019, arXiv:1906.04721, section 4.1). With :math:`u_c` the
    range of what grows with :math:`d_c` and shares a grid over the channels (the activation; the first layer's weight,
    if it has one scale for all channels) and :math:`v_c` that of what shrinks (the second layer's weight):

    .. math:: d_c = \sqrt{v_c / u_c}

    which is equation 11 there, with the activation's range among those that count: with a scale for every channel of
    the weights it is the activation that has most to gain. A depthwise layer that has a scale for every channel does
    not mind: :math:`d_c = 1 / u_c` before it. The numbers are rounded to powers of two, so that the float function
    stays the same bit for bit; it is compared on the first batch, and a pair that does not keep it is left as it was.

    A ReLU6 or Hardtanh does not commute with scales: what clips at :math:`a` would have to clip channel c at
    :math:`a d_c`, which one grid has no code for. Such pairs are left out, and so are pairs between which another
    operation lies, or whose value something else reads (a residual sum, say).

    Args:
        model: prepared; changed in place, and calibrated anew. Parameters that change become the model's own, and the
            float model keeps its own: make optimizers afterwards.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Returns:
        By the name of the first layer of each pair.

    Raises:
        TypeError: a batch does not fit the model's forward, or ``batches`` is itself a batch.
        ValueError: the model is not prepared, or there are no batches. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Conv2d(8, 2, 1))
        >>> prepared = prepare(model, QATConfig(), (torch.randn(1, 3, 8, 8),))
        >>> print(equalize(prepared, [torch.randn(16, 3, 8, 8)]))
        equalize: 1 changed, 1 left out
          2: its activation clips at 6, where scales do not commute with it
    """
    batches = kept(batches)
    with unchanged_on_error(model):
        report = equalized(model, batches)
        measure_ranges(model, batches)
    return report


def equalized(model: nn.Module, batches: Iterable[Any]) -> MethodReport:
    """:func:`equalize` without measuring ranges afterwards."""
    nodes_of(model)
    batches = kept(batches)
    report = MethodReport("equalize")
    layers = quantized_layers(model, batches[0])
    edges = edges_of(model, layers, QATModuleWrapper, report)
    measure_extents(model, edges, batches)
    factors = {edge: powers_of_two(factor) for edge, factor in _factors(edges).items()}
    migrate(model, layers, factors, batches[0], report)
    return report


def _factors(edges: list[Edge]) -> dict[Edge, Tensor]:
    """Alternately for every edge, since a layer between two of them counts for both, until they are at rest."""
    factors = {edge: torch.ones_like(edge.extents) for edge in edges if edge.extents is not None}
    made: dict[QuantizedLayer, Edge] = {e.producer: e for e in factors if isinstance(e.producer, QuantizedLayer)}
    read = {reader: edge for edge in factors for reader in edge.readers}
    for _ in range(_SWEEPS):
        for edge in factors:
            assert edge.extents is not None
            growing = [edge.extents]
            producer = edge.producer
            assert isinstance(producer, QuantizedLayer)
            if producer.batch_norm is None and producer.weight_node.scheme.channel_axis is None:
                growing.append(_by_output(producer, _factor(read, producer, factors)))
            shrinking = []
            for reader in edge.readers:
                if not _has_scale_of_its_own(reader):
                    shrinking.append(_by_input(reader, _factor(made, reader, factors)))
            factors[edge] = _balanced(growing, shrinking)
    return factors


def _factor(edges: dict[QuantizedLayer, Edge], layer: QuantizedLayer, factors: dict[Edge, Tensor]) -> Tensor | None:
    return factors[edges[layer]] if layer in edges else None


def _has_scale_of_its_own(reader: QuantizedLayer) -> bool:
    """Whether the weights of one input channel have a scale that no other channel shares: depthwise, per channel."""
    return reader.weight_node.scheme.channel_axis is not None and input_channels(reader).shape[2] == 1


def _by_output(layer: QuantizedLayer, divided: Tensor | None) -> Tensor:
    """The largest weight of each output, with the input channels divided by what another edge gives them."""
    channels = input_channels(layer).abs().amax(3)
    if divided is not None:
        channels = channels / divided.reshape(channels.shape[0], 1, -1)
    return channels.amax(2).flatten()


def _by_input(layer: QuantizedLayer, multiplied: Tensor | None) -> Tensor:
    """The largest weight of each input channel, relative to the scale that it shares."""
    channels = input_channels(layer).abs().amax(3)
    if layer.weight_node.scheme.channel_axis is not None:
        return (channels / channels.amax(2, keepdim=True).clamp(min=1e-30)).amax(1).flatten()
    if multiplied is not None and layer.batch_norm is None:
        channels = channels * multiplied.reshape(channels.shape[0], -1, 1)
    return channels.amax(1).flatten()


def _balanced(growing: list[Tensor], shrinking: list[Tensor]) -> Tensor:
    up = torch.stack(growing).log2().mean(0)
    factors = -up
    if shrinking:
        factors = (torch.stack(shrinking).amax(0).log2() - up) / 2
    usable = torch.isfinite(factors)
    if not bool(usable.any()):
        return torch.ones_like(factors)
    # As a whole, the value's range is to stay what it was.
    largest = (growing[0].log2() + factors)[usable].amax() - growing[0].log2()[usable].amax()
    return torch.where(usable, torch.exp2(factors - largest), 1.0)
