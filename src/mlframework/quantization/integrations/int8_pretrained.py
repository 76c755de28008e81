"""Hugging Face: ``save_pretrained`` and ``from_pretrained`` of a converted model.

``save_pretrained`` writes the file of :func:`save` in the place of the float weights, and an entry
``quantization_config`` into ``config.json``. By that, ``from_pretrained`` finds the quantizer that is registered here
with ``transformers``, which hands the network that it has built to :func:`load`.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..conversion.save_pretrained import use_writer
from ..graph.float_structure import FLOAT_STRUCTURE
from ..int8.integer_module import IntegerModule
from ..saving.save_load import load, write
from ..saving.saved_file import FORMAT_VERSION

METHOD = "mlframework-quantization"

_FILE = "model.safetensors"
_REGISTRIES = ("_modules", "_parameters", "_buffers")


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """The entry in ``config.json``; all else is in the file of the weights.

    Args:
        version: of that file's format.
    """

    def __init__(self, version: int = FORMAT_VERSION, **kwargs: Any) -> None:
        self.quant_method: Any = METHOD
        self.version = version


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """Has ``from_pretrained`` make the converted model that was saved.

    Raises:
        ValueError: there is no converted model to be loaded, or it is to be on several devices or of another dtype than
            it was saved in.
    """

    requires_calibration = True

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if checkpoint_files is None or len(checkpoint_files) != 1:
            raise ValueError(f"a converted model must be in one file, got {checkpoint_files}")
        self._path = checkpoint_files[0]
        devices = {device_map} if isinstance(device_map, (str, int, torch.device)) else set((device_map or {}).values())
        if len(devices) > 1 or devices & {"auto", "balanced", "balanced_low_0", "sequential", "disk"}:
            raise ValueError(f"device_map must name one device for a converted model, got {device_map}")
        self._device = next(iter(devices), None)
        # Until the weights are loaded, which transformers would do by names and shapes, there is nothing to load.
        self._contents = {name: dict(vars(model)[name]) for name in _REGISTRIES}
        for name in _REGISTRIES:
            vars(model)[name].clear()
        self._tied = model.all_tied_weights_keys
        model.all_tied_weights_keys = {}
        model._keys_to_ignore_on_load_unexpected = {"."}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, contents in self._contents.items():
            vars(model)[name].update(contents)
        del model._keys_to_ignore_on_load_unexpected
        model.all_tied_weights_keys = self._tied
        del self._contents, self._tied
        load(self._path, model)
        if self._device is not None:
            model.to(self._device)
        return model

    def is_serializable(self) -> bool:
        """By the model's own ``save_pretrained``."""
        return True

    @property
    def is_trainable(self) -> bool:
        """A converted model is for inference."""
        return False


def write_pretrained(model: nn.Module, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """``save_pretrained`` of a converted model: its file and its configuration.

    Args:
        model: the converted model.
        save_directory: the folder, which is made where there is none.
        **kwargs: those of ``save_pretrained``; what would split the file, or write another one, is refused.

    Raises:
        TypeError: the model is none of ``transformers``.
        ValueError: an argument asks for something else than one file with the model in it; or what :func:`save` raises.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, got {type(model).__name__}: use save(model, path)")
    for name in ("state_dict", "variant", "push_to_hub", "distributed_checkpoint"):
        if kwargs.get(name):
            raise ValueError(f"{name} must be left out for a converted model, got {kwargs[name]!r}")
    if not kwargs.get("is_main_process", True):
        return
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    write(model, folder / _FILE, "int8.", {_first_parameter(model): torch.empty(0)})
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    dtype = next(module.float_dtype for module in model.modules() if isinstance(module, IntegerModule))
    config.dtype = str(dtype).removeprefix("torch.")
    config.quantization_config = Int8Config()
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _first_parameter(model: nn.Module) -> str:
    """What the network calls one of its parameters. In the file, a tensor of that name is empty: without this module,
    ``from_pretrained`` raises for its shape, rather than that it takes what it can for a float network."""
    for prefix, module in model.named_modules():
        for name, record in vars(module).get(FLOAT_STRUCTURE, {}).items():
            if record.get("tensors"):
                return ".".join(filter(None, (prefix, name, next(iter(record["tensors"])))))
    return "weight"  # of a part alone, which is refused


use_writer(write_pretrained)
