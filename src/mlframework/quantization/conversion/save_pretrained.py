"""``save_pretrained`` of a converted model: Hugging Face's own would write integer codes as weights, which its
``from_pretrained`` would take for float ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

Writer = Callable[..., None]

# What writes a converted model, once Hugging Face's integration is imported, which is above this package.
_writers: list[Writer] = []


def use_writer(writer: Writer) -> None:
    """From now on, ``save_pretrained`` of every converted model calls ``writer`` with the model and its arguments."""
    _writers[:] = [writer]


class SavePretrained:
    """Stands in the place of a model's method."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, save_directory: Any, **kwargs: Any) -> None:
        """Writes the model into a folder.

        Raises:
            NotImplementedError: the integration is not imported.
        """
        if not _writers:
            raise NotImplementedError(
                "save_pretrained of a converted model needs this library's integration: "
                "import mlframework.quantization.integrations.transformers (or use save(model, path))"
            )
        _writers[0](self._model, save_directory, **kwargs)


def replace_save_pretrained(modules: Iterable[nn.Module]) -> None:
    """Gives those modules that have ``save_pretrained`` one for a converted model, which ``push_to_hub`` calls, too."""
    for module in modules:
        if callable(getattr(type(module), "save_pretrained", None)):
            vars(module)["save_pretrained"] = SavePretrained(module)
