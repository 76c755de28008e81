"""States of the float model, into a prepared one and out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.given_weight import GivenWeightWrapper
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.weight_range import set_range


def float_state_dict(model: nn.Module) -> dict[str, Any]:
    """Of a prepared model's state, what the model that was prepared loads strictly.

    Args:
        model: from :func:`prepare`.

    Returns:
        Keys and tensors of ``model.state_dict()``, without the quantization nodes; no copies, as there.

    Example:
        >>> prepared = prepare(nn.Sequential(nn.Linear(4, 2)), QATConfig(), (torch.randn(1, 4),))
        >>> list(float_state_dict(prepared))
        ['0.weight', '0.bias']
        >>> nn.Sequential(nn.Linear(4, 2)).load_state_dict(float_state_dict(prepared))
        <All keys matched successfully>
    """
    nodes = _prefixes_of_nodes(model)
    return {key: value for key, value in model.state_dict().items() if not key.startswith(nodes)}


def load_float_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Loads a checkpoint of the float model into a prepared one; a state that does not fit changes nothing.

    Scales of weights, learned ones too, start from the weights that were loaded (a learned one of a weight that the
    model's own code hands to a function, from the next batch of training). Those of activations stay as they are:
    :func:`calibrate`, or train.

    Args:
        model: from :func:`prepare`.
        state_dict: what the model that was prepared has as its ``state_dict()``.

    Raises:
        RuntimeError: keys are missing or not expected, or a tensor is of another shape; the first of them are named.

    Example:
        >>> prepared = prepare(nn.Sequential(nn.Linear(4, 2)), QATConfig(), (torch.randn(1, 4),))
        >>> checkpoint = nn.Sequential(nn.Linear(4, 2)).state_dict()
        >>> load_float_state_dict(prepared, checkpoint)
        >>> torch.equal(prepared[0].weight, checkpoint["0.weight"])
        True
    """
    own = float_state_dict(model)
    faults = [
        *_named("missing", own.keys() - state_dict.keys()),
        *_named("not expected", state_dict.keys() - own.keys()),
        *(
            f"{key} must be of shape {tuple(value.shape)}, got {tuple(state_dict[key].shape)}"
            for key, value in own.items()
            if isinstance(value, Tensor) and key in state_dict and state_dict[key].shape != value.shape
        ),
    ]
    if faults:
        raise RuntimeError(f"state_dict must be the float model's: {'; '.join(faults[:5])}")
    model.load_state_dict(state_dict, strict=False)
    for module in model.modules():
        if not isinstance(module, QATModuleWrapper) or module.weight_fake_quantize is None:
            continue
        node = module.weight_fake_quantize
        if not isinstance(module, GivenWeightWrapper):
            set_range(node, module.evaluated_weight())
        elif node.learnable:  # the model's own code is to hand the weight over, with the next batch of training
            node.reset()


def _prefixes_of_nodes(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FakeQuantizeLayer))


def _named(fault: str, keys: Iterable[str]) -> list[str]:
    return [f"{key} is {fault}" for key in sorted(keys)]
