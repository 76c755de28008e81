"""What the layers of a model give while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.qat_operation import QATOperation

Outputs = dict[str, list[Tensor]]


def quantized_layers(prepared: nn.Module) -> dict[str, FakeQuantizeLayer | None]:
    """The layers, operations and free-standing nodes of a prepared model by name, each with the node that its output
    is on the grid of (None where the output is float)."""
    found: dict[str, FakeQuantizeLayer | None] = {}
    inside: tuple[str, ...] = ()
    for name, module in prepared.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, FakeQuantizeLayer):
            found[name] = module
        elif isinstance(module, (QATModuleWrapper, QATOperation)):
            found[name] = module.output_fake_quantize
        if name in found and name:
            inside += (f"{name}.",)
        elif name in found:
            break  # the root itself
    return found


@contextmanager
def recorded_outputs(model: nn.Module, names: Iterable[str]) -> Iterator[Outputs]:
    """Fills a dictionary with what the modules of these names return, call after call, in the order of first calls."""
    outputs: Outputs = {}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:  # what follows may change it in place
            outputs.setdefault(name, []).append(output.detach().clone())

        return record

    handles = [model.get_submodule(name).register_forward_hook(recorder(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
