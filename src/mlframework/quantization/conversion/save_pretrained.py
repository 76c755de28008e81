"""Keeps integer codes from being saved as what Hugging Face's ``from_pretrained`` would load as float weights."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn


def refuse_save_pretrained(converted: nn.Module) -> None:
    """Has ``save_pretrained`` of every module that has one raise, and ``push_to_hub`` with it, which calls it."""
    for module in converted.modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            module.save_pretrained = _refuse  # type: ignore[assignment]


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        "save_pretrained of a converted model is not possible: from_pretrained would load its integer codes as float "
        "weights. Save the prepared model, or the state with torch.save(model.state_dict(), path)"
    )
