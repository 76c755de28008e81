"""Models made of one function, and what placement did to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mlframework.quantization import FakeQuantizeLayer, QATConfig, QATModuleWrapper, prepare
from mlframework.quantization.int8.integer_operation import Addition, IntegerOperation
from mlframework.quantization.qat.qat_operation import QATOperation

IMAGES = torch.randn(2, 3, 8, 8)


class Runs(nn.Module):
    """A model whose forward is a function, with modules of any name."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def placed(function: Callable[..., Any], config: QATConfig | None = None, **modules: nn.Module) -> nn.Module:
    return prepare(Runs(function, **modules), config, (IMAGES,))


def free_nodes(model: nn.Module) -> list[str]:
    """Nodes that belong to no wrapper and no sum."""
    return [name for name, module in model.named_children() if isinstance(module, FakeQuantizeLayer)]


def joined(model: nn.Module, kind: type[IntegerOperation] = IntegerOperation) -> list[QATOperation]:
    """Operations on codes, of one kind or of any."""
    modules = [module for module in model.modules() if isinstance(module, QATOperation)]
    return [module for module in modules if isinstance(module.operation, kind)]


def sums(model: nn.Module) -> list[QATOperation]:
    return joined(model, Addition)


def source(model: nn.Module, name: str) -> FakeQuantizeLayer | None:
    wrapper = model.get_submodule(name)
    assert isinstance(wrapper, QATModuleWrapper)
    return wrapper.input_source


def output(model: nn.Module, name: str) -> FakeQuantizeLayer | None:
    return model.get_submodule(name).output_fake_quantize
