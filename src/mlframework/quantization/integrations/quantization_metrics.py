"""What a log shows of a prepared model: of each node its scale; of each layer what its grid clips, and the noise."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from ..analysis.calls import Call
from ..analysis.explain import explanation_of
from ..analysis.history import median_scale
from ..analysis.layer_groups import layer_groups
from ..conversion.convert import unwrapped
from ..preparation.batches import arguments_of
from ..preparation.report import preparation_report
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.sharding import sharded_parameter


class ScalarWriter(Protocol):
    """What writes scalars, as ``SummaryWriter`` of TensorBoard does."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Writes one."""


def quantization_metrics(model: nn.Module, batch: Any = None) -> dict[str, float]:
    """The figures of a prepared model that are worth a curve, by tag.

    - ``quantization/scale/<node>``: the scale of each node that data has reached, its median over channels.
    - ``quantization/clipped_share/<layer>``: the share of values outside of the grid of a layer's output (and of its
      input, where it has a node of its own for that), given the values that the network has without quantization.
    - ``quantization/snr/<layer>``: the signal-to-noise ratio of a layer's output in dB, against the same network with
      its nodes off; :func:`explain` says where the noise comes from.

    The last two take a batch and as much time as a few forwards, in evaluation mode and without gradients; before any
    data there are none. The model is left as it was.

    Args:
        model: from :func:`prepare`; of what ``torch.compile`` or ``DistributedDataParallel`` made, the model inside.
        batch: a tensor, a tuple of positional arguments or a mapping of keyword arguments, as for :func:`calibrate`.

    Raises:
        TypeError: the model is not prepared, or the batch does not fit its forward.
        ValueError: parameters of the model are split over ranks.

    Example:
        >>> prepared = prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), QATConfig(), (torch.randn(1, 4),))
        >>> calibrate(prepared, [torch.randn(32, 4)])
        >>> sorted(quantization_metrics(prepared, torch.randn(8, 4)))[:2]
        ['quantization/clipped_share/0', 'quantization/clipped_share/input_1']
    """
    model = unwrapped(model)
    return metrics_of_call(model, None if batch is None else arguments_of(model, batch))


def log_quantization(model: nn.Module, writer: ScalarWriter, step: int, batch: Any = None) -> None:
    """Writes :func:`quantization_metrics` to TensorBoard, or whatever has its ``add_scalar``.

    Args:
        model: from :func:`prepare`.
        writer: ``torch.utils.tensorboard.SummaryWriter``, or alike.
        step: where on the axis of the curves.
        batch: as for :func:`quantization_metrics`; None for scales alone.

    Raises:
        TypeError: the model is not prepared, or the batch does not fit its forward.
        ValueError: parameters of the model are split over ranks.

    Example:
        >>> class Printer:
        ...     def add_scalar(self, tag, scalar_value, global_step):
        ...         print(global_step, tag, round(scalar_value, 4))
        >>> prepared = prepare(nn.Linear(4, 2, bias=False), QATConfig(), (torch.ones(1, 4),))
        >>> calibrate(prepared, [torch.ones(1, 4)])
        >>> log_quantization(prepared, Printer(), step=7)  # doctest: +ELLIPSIS
        7 quantization/scale/input 0.0039
        7 quantization/scale/weight ...
    """
    write_scalars(writer, quantization_metrics(model, batch), step)


def write_scalars(writer: ScalarWriter, metrics: dict[str, float], step: int) -> None:
    """Writes each figure under its tag."""
    for tag, value in metrics.items():
        writer.add_scalar(tag, value, step)


def metrics_of_call(model: nn.Module, call: Call | None) -> dict[str, float]:
    """:func:`quantization_metrics` for arguments of a call of the prepared model itself."""
    preparation_report(model)
    sharded = sharded_parameter(model)
    if sharded is not None:
        raise ValueError(f"model must hold whole parameters, got {sharded} split over ranks")
    metrics = {
        f"quantization/scale/{_tag(name)}": median_scale(node)
        for name, node in model.named_modules()
        if isinstance(node, FakeQuantizeLayer) and node.is_initialized
    }
    if call is None or not _has_reached_layers(model):
        return metrics
    for layer in explanation_of(model, [call]).layers:
        metrics[f"quantization/clipped_share/{_tag(layer.name)}"] = layer.own.clipped_share
        metrics[f"quantization/snr/{_tag(layer.name)}"] = layer.snr
    return metrics


def _tag(name: str) -> str:
    return name.removesuffix("_fake_quantize") or "(the model)"


def _has_reached_layers(model: nn.Module) -> bool:
    try:
        layer_groups(model)
    except ValueError:
        return False
    return True
