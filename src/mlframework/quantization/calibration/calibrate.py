"""``calibrate``: statistics without training (post-training quantization)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ..qat.observer_synchronizer import is_distributed
from .batch_norm import reestimate_batch_norm
from .bias_correction import correct_bias
from .equalization import equalized
from .own_parameters import unchanged_on_error
from .ranges import measure_ranges
from .rounding import round_weights
from .runs import kept, nodes_of
from .smoothing import smoothed

_Method = Callable[[nn.Module, Iterable[Any]], Any]

# Those that change what the float model's values are, whose ranges are to be measured afterwards.
_IN_FLOAT: dict[str, _Method] = {"smooth_activations": smoothed, "equalize": equalized}
# Those that work on a quantized model, whose ranges have been measured.
_QUANTIZED: dict[str, _Method] = {
    method.__name__: method for method in (round_weights, correct_bias, reestimate_batch_norm)
}
METHODS = (*_IN_FLOAT, *_QUANTIZED)


def calibrate(model: nn.Module, batches: Iterable[Any], *, method: str | Sequence[str] = ()) -> None:
    """Runs batches through the model in float, observes every node, and sets the scales from what was seen.

    Earlier statistics are forgotten. The model computes in evaluation mode, without gradients and without
    quantization; its modes are restored. Where ``torch.distributed`` runs, every rank must bring as many batches. If
    a batch fails, the model is as it was before the call.

    The methods:

    - :func:`smooth_activations`: outliers of channels move from activations after normalizations into weights.
    - :func:`equalize`: channels between two layers get ranges alike.
    - :func:`round_weights`: up or down so that layers' outputs stay close to the float model's.
    - :func:`correct_bias`: takes the mean of each layer's error into its bias.
    - :func:`reestimate_batch_norm`: statistics of batch normalization, with quantized weights.

    Args:
        model: from :func:`prepare` (or any module that holds :class:`FakeQuantizeLayer`).
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. With a
            method they are kept in memory, since they run several times.
        method: what else to do so that post-training quantization loses less: the name of one of the functions above,
            or several, applied in that order. Those change weights, biases or statistics of the prepared model, and
            none of the float model that it was made of.

    Raises:
        RuntimeError: a method under ``torch.distributed``, whose ranks would part: none of them communicates.
        TypeError: a batch does not fit the model's forward, or ``batches`` is itself a batch.
        ValueError: there are no nodes in the model (it is not prepared, or nothing in it could be quantized), or no
            batches; a method is unknown; ``"correct_bias"`` beside ``"round_weights"``, which fits biases itself and
            leaves no float weights to correct them by; or ``"reestimate_batch_norm"`` finds no batch normalization.

    Example:
        >>> prepared = prepare(nn.Linear(4, 2), QATConfig(), (torch.randn(1, 4),))
        >>> calibrate(prepared, [torch.randn(16, 4) for _ in range(3)])
        >>> with torch.no_grad():
        ...     prepared.eval()(torch.randn(1, 4)).shape  # computed on integers
        torch.Size([1, 2])
        >>> calibrate(prepared, [torch.randn(16, 4)], method="correct_bias")
    """
    nodes_of(model)
    methods = (method,) if isinstance(method, str) else tuple(method)
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"method must be among {', '.join(METHODS)}, got {unknown[0]!r}")
    if {correct_bias.__name__, round_weights.__name__} <= set(methods):
        raise ValueError(f"method must not have correct_bias beside round_weights, which fits biases, got {methods}")
    if methods and is_distributed():
        raise RuntimeError(
            f"method must be empty under torch.distributed, got {methods}: calibrate in one process, and load the state"
        )
    with unchanged_on_error(model):
        if methods:
            batches = kept(batches)
        is_measured = False
        for name in methods:
            if name in _IN_FLOAT:
                _IN_FLOAT[name](model, batches)
                is_measured = False
                continue
            if not is_measured:
                measure_ranges(model, batches)
                is_measured = True
            _QUANTIZED[name](model, batches)
        if not is_measured:
            measure_ranges(model, batches)
