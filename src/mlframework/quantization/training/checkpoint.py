"""The file that an interrupted :func:`.finetune` leaves, and what of its content is checked before any is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..replaced_file import replaced_file

_OF_A_PARAMETER = dict.fromkeys(("step", "exp_avg", "exp_avg_sq"))  # what AdamW keeps


def write_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Writes a state; an interruption meanwhile leaves the file that was there before."""
    with replaced_file(path) as file:
        torch.save(state, file)


def read_checkpoint(path: Path) -> Any:
    """What :func:`write_checkpoint` wrote. Nothing but tensors and plain values is unpickled.

    Raises:
        ValueError: the file is cut off, or no such file.
    """
    try:
        return torch.load(path, weights_only=True)
    except (PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # of many kinds, by where a file ends
        raise ValueError(
            f"checkpoint {str(path)!r} must be a whole file of finetune(), got one that cannot be read; "
            "give another path, or remove the file to start anew"
        ) from error


def require_fields(state: Any, own: Mapping[str, Any], name: str) -> None:
    """Refuses what is no dictionary with the fields of one's own.

    Raises:
        ValueError: fields are missing or not expected.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{name} must be a dictionary of {sorted(own)}, got {type(state).__name__}")
    if state.keys() != own.keys():
        raise ValueError(f"{name} must have the fields {sorted(own)}, got {sorted(map(str, state))}")


def require_like(saved: Any, own: Any, name: str) -> None:
    """Refuses a plain value that is not of the kind of one's own.

    Raises:
        ValueError: it is of another type or length, or a number that is not finite.
    """
    if isinstance(own, (list, tuple)):
        if type(saved) is not type(own) or len(saved) != len(own):
            raise ValueError(f"{name} must be a {type(own).__name__} of {len(own)} values, got {saved!r}")
        for value, own_value in zip(saved, own, strict=True):
            require_like(value, own_value, name)
    elif type(saved) is not type(own) or (isinstance(saved, float) and not math.isfinite(saved)):
        raise ValueError(f"{name} must be a finite {type(own).__name__}, got {saved!r}")


def require_optimizer_state(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Refuses the state of an optimizer of other parameters, of which PyTorch compares no shapes.

    Raises:
        ValueError: numbers of parameters differ, or a tensor is not of the shape of its parameter.
    """
    own = optimizer.state_dict()
    require_fields(state, own, "optimizer")
    groups = state["param_groups"]
    counts = [len(group["params"]) for group in own["param_groups"]]
    found = [len(group.get("params", ())) for group in groups] if _are_mappings(groups) else groups
    if found != counts:
        raise ValueError(f"optimizer must have groups of {counts} parameters, got {found}")
    for index, (group, own_group) in enumerate(zip(groups, own["param_groups"], strict=True)):
        require_fields(group, own_group, f"optimizer's group {index}")
        for name in own_group.keys() - {"params"}:
            require_like(group[name], own_group[name], f"optimizer's {name} of group {index}")
    parameters = dict(
        zip(
            (index for group in groups for index in group["params"]),
            (parameter for group in optimizer.param_groups for parameter in group["params"]),
            strict=True,
        )
    )
    if not isinstance(state["state"], Mapping) or not parameters.keys() >= state["state"].keys():
        raise ValueError(f"optimizer's state must be of its {len(parameters)} parameters, got that of others")
    for index, values in state["state"].items():
        shape = parameters[index].shape
        require_fields(values, _OF_A_PARAMETER, f"optimizer's state of parameter {index}")
        for name, value in values.items():
            expected = () if name == "step" else tuple(shape)
            if not isinstance(value, Tensor) or tuple(value.shape) != expected:
                got = tuple(value.shape) if isinstance(value, Tensor) else value
                raise ValueError(f"optimizer's {name} of parameter {index} must be of shape {expected}, got {got}")


def _are_mappings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, Mapping) for value in values)
