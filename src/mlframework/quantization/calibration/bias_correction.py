"""``correct_bias``: takes the mean of each layer's quantization error out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import QuantizedLayer, quantized_layers, watched_inputs
from .own_parameters import own_parameters, unchanged_on_error
from .report import MethodReport
from .runs import evaluating, kept, nodes_of, nodes_off, run


def correct_bias(model: nn.Module, batches: Iterable[Any]) -> MethodReport:
    r"""Shifts each layer's output, channel by channel, by the mean of what quantization does to it.

    Rounding a weight by :math:`\epsilon` moves the mean of the output by :math:`\epsilon\, E[x]`, which adds up along
    the network (Nagel et al. 2019, arXiv:1906.04721, section 4.2). The correction is empirical (appendix D there):

    .. math:: b \leftarrow b + E[W x] - E[\tilde W \tilde x]

    with x the float model's input of the layer and :math:`\tilde x` the quantized model's, in which the layers before
    are corrected. For every batch that is found in one pass, layer by layer; corrections are averaged over batches.

    The correction goes into the bias. Where batch normalization follows, it goes into the running mean, which is where
    training would put it; a layer with neither is left out. So are layers that :func:`round_weights` rounded: it fitted
    their biases, and what the float weights computed is not known any more.

    Args:
        model: prepared and calibrated; changed in place. Biases that change become the model's own Parameters, and the
            float model keeps its own: make optimizers afterwards.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Raises:
        TypeError: a batch does not fit the model's forward, or ``batches`` is itself a batch.
        ValueError: the model is not prepared, or there are no batches. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prepared = prepare(model, QATConfig(weight_bits=4), (torch.randn(1, 4),))
        >>> batches = [torch.randn(32, 4) for _ in range(3)]
        >>> calibrate(prepared, batches)
        >>> print(correct_bias(prepared, batches))
        correct_bias: 2 changed
    """
    nodes_of(model)
    batches = kept(batches)
    layers = quantized_layers(model, batches[0])
    report, corrected = MethodReport("correct_bias"), []
    for layer in layers:
        reason = _obstacle(layer)
        report.note(layer.name, reason)
        if reason is None:
            corrected.append(layer)
    with unchanged_on_error(model), evaluating(model):
        biases = [layer.bias for layer in corrected if layer.bias is not None and layer.batch_norm is None]
        own = own_parameters(model, biases)
        corrections = [_Correction(layer, own) for layer in corrected]
        for batch in batches:
            for correction in corrections:
                correction.restart()
            with nodes_off(model), watched_inputs(corrected, _each(corrections, _Correction.see_float)):
                run(model, batch)
            with watched_inputs(corrected, _each(corrections, _Correction.apply)):
                run(model, batch)
        for correction in corrections:
            correction.settle()
    return report


def _obstacle(layer: QuantizedLayer) -> str | None:
    if isinstance(layer.layer, nn.Embedding):
        return "it has no bias"
    if layer.weight is None:
        return "its weight is computed"
    if layer.wrapper.weight_fake_quantize is None:
        return "its weight is not quantized"
    if len(layer.wrappers) > 1:
        return "it is called at several places"
    weight, node = layer.float_weight, layer.weight_node
    if not node.observer.enabled and torch.equal(node.to_values(node.to_codes(weight)).to(weight), weight):
        return "its weight is rounded"
    if layer.batch_norm is None and layer.bias is None:
        return "its bias is computed" if layer.has_computed_bias else "it has no bias"
    return None


class _Correction:
    """Of one layer: what a batch asks for, and the mean of that so far.

    ``target`` is what moves the output: the bias or, with the opposite sign, the running mean.
    """

    def __init__(self, layer: QuantizedLayer, own: Mapping[nn.Parameter, nn.Parameter]) -> None:
        self.layer = layer
        self.sign = 1 if layer.batch_norm is None else -1
        self.target: Tensor = own[layer.bias] if layer.batch_norm is None else layer.batch_norm.running_mean  # type: ignore[index]
        self.start = self.target.detach().clone()
        self.total = torch.zeros_like(self.start, dtype=torch.float64)
        self.calls = 0
        self.means: deque[Tensor] = deque()  # of the float model's calls that the quantized one has yet to make

    def restart(self) -> None:
        """The float model's own bias, for the next batch."""
        self.means.clear()
        self.target.copy_(self.start)

    def see_float(self, input: Tensor) -> None:
        self.means.append(self.layer.mean_output(self.layer.mean_input(input), self.layer.float_weight))

    def apply(self, input: Tensor) -> None:
        """Corrects the layer for this batch, before it computes."""
        if not self.means:  # a call that the float model did not make
            return
        weight, node = self.layer.float_weight, self.layer.weight_node
        rounded = node.to_values(node.to_codes(weight)).to(weight)
        shift = self.means.popleft() - self.layer.mean_output(self.layer.mean_input(input), rounded)
        self.total += shift
        self.calls += 1
        self._set(shift)

    def settle(self) -> None:
        if self.calls:
            self._set(self.total / self.calls)

    def _set(self, shift: Tensor) -> None:
        self.target.copy_(self.start + self.sign * shift)


def _each(
    corrections: Iterable[_Correction], method: Callable[[_Correction, Tensor], None]
) -> Callable[[QuantizedLayer, Tensor], None]:
    of_layer = {correction.layer: correction for correction in corrections}
    return lambda layer, input: method(of_layer[layer], input)
