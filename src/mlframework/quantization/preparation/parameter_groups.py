"""Scales and zero points for the optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..qat.fake_quantize_layer import FakeQuantizeLayer


def quantization_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The learned scales and zero points of a model, each once; none where nothing is learnable.

    Example:
        >>> prepared = prepare(nn.Linear(4, 2), QATConfig(learnable=True), (torch.randn(1, 4),))
        >>> [tuple(parameter.shape) for parameter in quantization_parameters(prepared)]
        [(1,), (1,), (2,), (1,), (1,)]
    """
    for parameter, _ in _with_codes(model):
        yield parameter


def _with_codes(model: nn.Module) -> Iterator[tuple[nn.Parameter, int | None]]:
    """Each learned parameter, with the number of codes above the lowest where it is a zero point; reads no value."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, FakeQuantizeLayer):
            codes = module.scheme.quant_max - module.scheme.quant_min
            for parameter, count in ((module.scale, None), (module.zero_point, codes)):
                if isinstance(parameter, nn.Parameter) and parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter, count


def _without_data(model: nn.Module) -> set[int]:
    """The ids of learned scales that no data has set: they have no size that a rate could be relative to. Warns."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizeLayer) and module.learnable and not module.is_initialized
    }
    if layers:
        first, others = next(iter(layers)) or "the node", len(layers) - 1
        warnings.warn(
            f"no data has set the scales of {first}{f' and {others} others' if others else ''}, so that a "
            "relative learning rate of them is 0, and they stay what the first batch makes them: calibrate, or run a "
            "batch, first",
            UserWarning,
            stacklevel=3,
        )
    return {id(layer.scale) for layer in layers.values()}


def parameter_groups(
    model: nn.Module,
    *,
    quantization_learning_rate: float | None = None,
    relative_quantization_learning_rate: float | None = None,
    vector_learning_rate: float | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: the model's own, and its scales without weight decay.

    Weight decay would pull scales to zero, that is, to a grid on which everything saturates.

    Adam and its kin take steps of the size of the learning rate, whatever the gradient, and a scale halves with every
    bit: choose the scales' rate below the scales themselves, or relative to them. On the digits demo 5e-3 did well at
    4 bits, 3e-4 at 8; on EfficientNet-Lite0 with 4-bit weights, 1e-3 of each scale.

    Args:
        model: a prepared model.
        quantization_learning_rate: of scales and zero points; the optimizer's own where not given.
        relative_quantization_learning_rate: in its place, the share by which a step of Adam changes a range: of a scale
            its present mean times this, of a zero point the number of codes times this. Each has a group of its own.
            Reads the scales back from their device; 0, with a warning, of those that no data has set.
        vector_learning_rate: of the model's own parameters with at most one axis: biases, what normalization multiplies
            by and adds, slopes of PReLU. They make up for the rounding of weights, are too few to learn data by heart,
            and take more than the weights do: on EfficientNet-Lite0 with 4-bit weights, ten times as much and more.
        options: of the model's own parameters (``lr``, ``weight_decay``, ...).

    Raises:
        ValueError: both rates are given.

    Example:
        >>> prepared = prepare(nn.Linear(4, 2), QATConfig(learnable=True), (torch.randn(1, 4),))
        >>> groups = parameter_groups(prepared, quantization_learning_rate=1e-3, weight_decay=1e-2)
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-2)
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.01, 0.01), (0.001, 0)]
    """
    if quantization_learning_rate is not None and relative_quantization_learning_rate is not None:
        raise ValueError(
            "quantization_learning_rate and relative_quantization_learning_rate must not both be given, got "
            f"{quantization_learning_rate} and {relative_quantization_learning_rate}"
        )
    learned = dict(_with_codes(model))
    ids = {id(parameter) for parameter in learned}
    own_parameters = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    groups: list[dict[str, Any]] = [{"params": own_parameters, **options}]
    if vector_learning_rate is not None:
        groups[0]["params"] = [parameter for parameter in own_parameters if parameter.dim() > 1]
        vectors = [parameter for parameter in own_parameters if parameter.dim() <= 1]
        groups.append({"params": vectors, **options, "lr": vector_learning_rate})
    own = {**options, "weight_decay": 0}
    if relative_quantization_learning_rate is not None:
        unset = _without_data(model)
        for parameter, codes in learned.items():
            size: float | None = codes
            if size is None:
                size = 0.0 if id(parameter) in unset else float(parameter.detach().mean())
            groups.append({"params": [parameter], **own, "lr": size * relative_quantization_learning_rate})
    elif learned:
        group: dict[str, Any] = {"params": list(learned), **own}
        if quantization_learning_rate is not None:
            group["lr"] = quantization_learning_rate
        groups.append(group)
    return groups
