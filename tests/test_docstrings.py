"""Every example in a docstring runs, with the public names at hand as a reader would have them."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch
from torch import nn

import mlframework.quantization as quantization

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(quantization.__path__, quantization.__name__ + ".")
    if not module.name.endswith("._compiled")  # the compiled kernels, which speak to PyTorch and not to Python
]
WITH_EXAMPLES = [module for module in MODULES if ">>> " in inspect.getsource(module)]


@pytest.mark.slow
@pytest.mark.parametrize("module", WITH_EXAMPLES, ids=lambda module: module.__name__)
def test_examples_in_docstrings(module: ModuleType) -> None:
    names = {name: getattr(quantization, name) for name in quantization.__all__}
    result = doctest.testmod(module, extraglobs={**names, "torch": torch, "nn": nn, "copy": copy})
    assert result.failed == 0


@pytest.mark.parametrize("name", quantization.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert getattr(quantization, name).__doc__
