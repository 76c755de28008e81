"""``round_weights``: weights rounded so that each layer's outputs, rather than its weights, change little."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .error_feedback import Moments, round_with_feedback
from .layers import QuantizedLayer, quantized_layers, watched_inputs
from .layers_as_products import is_product, matrix_of, rows_of, weight_of
from .own_parameters import own_parameters, unchanged_on_error
from .report import MethodReport
from .runs import evaluating, kept, nodes_of, nodes_off, run

# How many rows of inputs a layer's statistics are made of, about.
_ROWS = 16384
_ROWS_AN_INPUT = 24  # of an output, where that is more
_MOST_VALUES = 2**24  # 64 MiB
_FEWEST_ROWS = 4096  # also where these have more values
_DAMPINGS = (0.1, 1.0)  # of the moments, from what trusts the rows more to what trusts them less


def round_weights(model: nn.Module, batches: Iterable[Any]) -> MethodReport:
    r"""Rounds weights up or down so that what each layer computes stays close to the float model's.

    Layer by layer in the order in which they run, with x the float model's input and :math:`\tilde x` that of the model
    whose layers before are rounded already, W the float weight and Q the codes, it looks for

    .. math:: \min_{Q, b'} E\, \| (W x + b) - (s\, Q\, \tilde x + b') \|^2

    in closed form: the least-squares solution for Q in real numbers, which makes up for the errors of the layers before
    (Zhang et al. 2025, "Qronos", arXiv:2505.11695); codes by rounding with error feedback (GPTQ, Frantar et al. 2022,
    arXiv:2210.17323; :mod:`.error_feedback`); then the bias that fits these codes best, which goes where
    :func:`correct_bias` puts it. The scales s stay those of the weight alone: a search among narrower ones by what they
    do to these rows clips weights of inputs that are zero on a few pictures and not on others (EfficientNet-Lite0 with
    8 bits, calibrated on four photographs and tested on others: 2.4 dB, and 18.7 dB without the search).

    Weights hold the values of the codes afterwards, and their scales are held
    (``weight_fake_quantize.observer.enabled`` is False; a learned scale stays a Parameter): evaluation, conversion and
    export have these very codes. Training goes on from there; ``observer.enabled = True`` lets scales follow the
    weights again.

    Each pass over the batches rounds the layers that read one value, so this takes about half as many evaluations of
    the model as it has layers, and memory for some of the inputs of each layer: for 16384 or more where these take no
    more than about 64 MiB, and for 4096 at the least.

    More batches, of what the model is to be used on, can bring more than training does afterwards. EfficientNet-Lite0
    with 4-bit weights came from 6.8 dB (64 crops of four photographs, 4096 inputs of each layer) to 7.7 dB by 16384
    inputs, to 11.0 dB by 256 crops of sixteen photographs; the face detector of MTCNN from 11.5 dB to 12.4 by both; a
    denoiser from 22.2 to 26.4 dB by inputs alone. More is not always better: where photographs that no test was like
    widened the denoiser's ranges, it came to 20.9 dB. Compare on batches that were not calibrated on.

    Args:
        model: prepared and calibrated; changed in place. Weights and biases that change become the model's own
            Parameters, and the float model keeps its own: make optimizers afterwards.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. A few dozen
            images or sentences at the least.

    Raises:
        TypeError: a batch does not fit the model's forward, or ``batches`` is itself a batch.
        ValueError: the model is not prepared, or there are no batches. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> prepared = prepare(model, QATConfig(weight_bits=4), (torch.randn(1, 16),))
        >>> batches = [torch.randn(64, 16) for _ in range(4)]
        >>> calibrate(prepared, batches)
        >>> print(round_weights(prepared, batches))
        round_weights: 2 changed
    """
    nodes_of(model)
    batches = kept(batches)
    report, layers = MethodReport("round_weights"), []
    for layer in quantized_layers(model, batches[0]):
        reason = layer.obstacle
        if reason is None and not is_product(layer.layer):
            reason = "a transposed convolution is rounded to the nearest"
        report.note(layer.name, reason)
        if reason is None:
            layers.append(layer)
    with unchanged_on_error(model), evaluating(model):
        with nodes_off(model):
            seen = _inputs(model, layers, batches)
            reference = {layer: (inputs.rows, inputs.mean_output(layer)) for layer, inputs in seen.items()}
            seen.clear()
        biases = [layer.bias for layer in layers if layer.bias is not None and layer.batch_norm is None]
        own = own_parameters(model, [*(layer.weight for layer in layers if layer.weight is not None), *biases])
        for layer in layers:
            assert layer.weight is not None
            layer.weight = own[layer.weight]
            layer.bias = None if layer.bias is None else own.get(layer.bias)
        for together in _reading_one_value(layers):
            for layer, inputs in _inputs(model, together, batches).items():
                if layer in reference:
                    _round(layer, inputs, *reference.pop(layer))
    return report


def _reading_one_value(layers: Sequence[QuantizedLayer]) -> list[list[QuantizedLayer]]:
    """Neighbours whose input comes from one node, none of which changes what another is given."""
    together: list[list[QuantizedLayer]] = []
    for layer in layers:
        source = layer.wrapper.input_source
        if together and source is not None and together[-1][0].wrapper.input_source is source:
            together[-1].append(layer)
        else:
            together.append([layer])
    return together


class _Enough(BaseException):
    """Ends a run of the model whose rest is of no interest; no code of the model's takes it for an error."""


@dataclass
class _Inputs:
    """What a layer is given.

    Attributes:
        rows: (groups, rows, inputs of an output), of some positions.
        mean: over samples and calls; of all positions (:meth:`QuantizedLayer.mean_input`).
    """

    rows: Tensor
    mean: _MeanInput

    def mean_output(self, layer: QuantizedLayer) -> Tensor:
        """The mean of each output channel, with the weight that the layer has now and without its bias."""
        parts = [count * layer.mean_output(total / count, layer.float_weight) for total, count in self.mean.sums]
        return torch.stack(parts).sum(0) / sum(count for _, count in self.mean.sums)


class _MeanInput:
    """The mean of what a layer is called with: a sum for each shape, since the layer is linear."""

    def __init__(self) -> None:
        self._sums: dict[torch.Size, tuple[Tensor, int]] = {}

    @property
    def sums(self) -> list[tuple[Tensor, int]]:
        """Of every shape, and how many calls had it."""
        return list(self._sums.values())

    def add(self, mean: Tensor) -> None:
        """Of one call."""
        total, count = self._sums.get(mean.shape, (0, 0))
        self._sums[mean.shape] = total + mean, count + 1


def _inputs(
    model: nn.Module, layers: Sequence[QuantizedLayer], batches: Sequence[Any]
) -> dict[QuantizedLayer, _Inputs]:
    """Of each of the layers that the present model calls."""
    found: dict[QuantizedLayer, list[Tensor]] = {layer: [] for layer in layers}
    means = {layer: _MeanInput() for layer in layers}
    waiting: list[QuantizedLayer] = []

    def watch(layer: QuantizedLayer, input: Tensor) -> None:
        most = max(1, _rows_for(layer) // len(batches))
        rows = rows_of(layer.layer, input.detach().to(layer.float_weight.dtype), most)
        found[layer].append(rows.clone())
        means[layer].add(layer.mean_input(input))
        if layer in waiting:
            waiting.remove(layer)
        if not waiting:
            raise _Enough

    with watched_inputs(list(layers), watch):
        for batch in batches:
            waiting += [layer for layer in layers for _ in layer.wrappers]
            with suppress(_Enough):
                run(model, batch)
            waiting.clear()
    called = [layer for layer, rows in found.items() if rows]
    return {layer: _Inputs(torch.cat(found.pop(layer), dim=1), means[layer]) for layer in called}  # no two copies


def _rows_for(layer: QuantizedLayer) -> int:
    """How many rows of its inputs a layer's statistics are made of."""
    groups, _, inputs = matrix_of(layer.layer, layer.float_weight).shape
    wanted = max(_ROWS, _ROWS_AN_INPUT * inputs)
    return max(_FEWEST_ROWS, min(wanted, _MOST_VALUES // (groups * inputs)))


def _round(layer: QuantizedLayer, inputs: _Inputs, float_rows: Tensor, expected: Tensor) -> None:
    """Rounds one layer, given the float model's rows and mean output, too."""
    rows = inputs.rows
    if rows.shape != float_rows.shape:  # a model that does something else with quantized values
        float_rows = rows
    node, weight = layer.weight_node, layer.float_weight
    matrix = matrix_of(layer.layer, weight.clone())
    has_offset = layer.batch_norm is not None or layer.bias is not None
    codes, scale = _rounded(layer, matrix, rows, float_rows, has_offset)
    weight.copy_(weight_of(layer.layer, codes * scale, weight))
    # The scale is held; the statistics tell so to whoever loads this state, since they do not give the scale.
    node.observer.update(node.observer.measure(weight))
    node.observer.enabled = False
    if layer.batch_norm is not None:
        layer.batch_norm.running_mean.sub_(expected - inputs.mean_output(layer))
    elif layer.bias is not None:
        layer.bias.detach().add_(expected - inputs.mean_output(layer))


def _rounded(
    layer: QuantizedLayer, matrix: Tensor, rows: Tensor, float_rows: Tensor, has_offset: bool
) -> tuple[Tensor, Tensor]:
    """Codes, and scales (G, R, 1), by the damping that does best on the half of the rows that it is not fitted to: a
    layer with more inputs than there are rows would make up for what is chance. Where the nearest codes do best, it
    keeps them."""
    scheme, half = layer.weight_node.scheme, rows.shape[1] // 2
    scale = layer.weight_node.scale.detach().to(matrix.dtype).expand(matrix.shape[0] * matrix.shape[1])
    scale = scale.reshape(*matrix.shape[:2], 1)

    # A bias takes up what all outputs are off by. Of the layer's own rounding that is to be little nevertheless, since
    # the mean of other data is another.
    def fitted(rows: Tensor, float_rows: Tensor, damping: float) -> Tensor:
        moments = Moments(rows.mT @ rows / max(1, rows.shape[1]), damping)
        missing = float_rows - rows
        if has_offset:
            missing = missing - missing.mean(1, keepdim=True)
        target = matrix + moments.solved((missing @ matrix.mT).mT @ rows / max(1, rows.shape[1]))
        return round_with_feedback(target, moments, scale, scheme.quant_min, scheme.quant_max)

    def error(codes: Tensor) -> float:
        difference = float_rows[:, half:] @ matrix.mT - rows[:, half:] @ (codes * scale).mT
        if has_offset:
            difference = difference - difference.mean(1, keepdim=True)
        return float(difference.square().sum())

    if not half:
        return fitted(rows, float_rows, _DAMPINGS[0]), scale
    nearest = (matrix / scale).round().clamp(scheme.quant_min, scheme.quant_max)
    errors = [error(fitted(rows[:, :half], float_rows[:, :half], damping)) for damping in _DAMPINGS]
    if error(nearest) <= min(errors):
        return nearest, scale
    return fitted(rows, float_rows, _DAMPINGS[errors.index(min(errors))]), scale
