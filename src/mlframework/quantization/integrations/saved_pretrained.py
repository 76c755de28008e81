"""What ``save_pretrained`` writes of a prepared model, and how it loads.

For many architectures it renames parameters to what they are called on the Hub. ``from_pretrained`` renames them back;
``Trainer``, when it resumes and when it loads the best model, does not, and goes on without what it did not find.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..preparation.float_state import float_state_dict
from .training_run import require_prepared

_FILE = "model.safetensors"


def load_saved(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Loads what ``save_pretrained`` wrote of a prepared model, into one that was prepared alike.

    ``from_pretrained`` gives the float model back, with the weights as they were trained, and names the quantization
    state among unexpected keys. What the float model's ``save_pretrained`` wrote is for ``from_pretrained``.

    Args:
        model: from :func:`prepare`.
        folder: of ``save_pretrained``, or a checkpoint of ``Trainer``.

    Raises:
        ValueError: the model is not prepared.
        FileNotFoundError: there is no ``model.safetensors``, or a shard of it is missing.
        RuntimeError: the state is not that of a model prepared alike.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> network = ViTForImageClassification(
        ...     ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=4,
        ...               patch_size=2))
        >>> example = {"pixel_values": torch.randn(1, 3, 4, 4)}
        >>> prepared = prepare(network, QATConfig(), example_kwargs=example)
        >>> calibrate(prepared, [example])
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     prepared.save_pretrained(folder)
        ...     again = prepare(ViTForImageClassification(network.config), QATConfig(), example_kwargs=example)
        ...     load_saved(again, folder)
        >>> torch.equal(again.classifier.input_source.scale, prepared.classifier.input_source.scale)
        True
    """
    model = require_prepared(model)
    state: dict[str, Any] = dict(_saved_state(Path(folder)))
    _take_own_names(model, state)
    model.load_state_dict(state)


def loads_saved_names(model: nn.Module) -> None:
    """Has a prepared model load the names that ``save_pretrained`` writes, and refuse, strict or not, the state of a
    prepared model with names that it does not know."""
    hooks = model._load_state_dict_pre_hooks
    if not any(getattr(hook, "hook", hook) is _before_load for hook in hooks.values()):
        handle = model.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]
        hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]  # the others know the model's names


def _before_load(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,  # True whatever load_state_dict() was given
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_messages: list[str],
) -> None:
    if prefix:  # saved as part of another model, whose saving renames nothing
        return
    _take_own_names(model, state_dict)
    own = model.state_dict()
    unknown = [key for key in state_dict if key not in own]
    if unknown and any(key in state_dict for key in own.keys() - float_state_dict(model).keys()):
        raise RuntimeError(f"state_dict must be that of a model prepared alike; not expected: {unknown[:5]}")


def _take_own_names(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Gives the model's own names to what was written under others; and of tied parameters, of which one is written,
    the others theirs."""
    own = model.state_dict()
    if isinstance(model, PreTrainedModel):
        names = {id(tensor): name for name, tensor in own.items()}
        for written, tensor in revert_weight_conversion(model, own).items():
            name = names.get(id(tensor))
            if name is not None and name != written and written in state_dict and name not in state_dict:
                state_dict[name] = state_dict.pop(written)
    loaded = {_place(tensor): name for name, tensor in own.items() if name in state_dict}
    for name, tensor in own.items():
        if name not in state_dict and _place(tensor) in loaded and tensor.numel():
            state_dict[name] = state_dict[loaded[_place(tensor)]]


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _saved_state(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{_FILE}.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {_FILE}
    state: dict[str, Tensor] = {}
    for name in sorted(names):
        if not (folder / name).exists():
            raise FileNotFoundError(f"folder must be one that save_pretrained wrote, got {folder} without {name}")
        state.update(load_file(folder / name))
    return state
