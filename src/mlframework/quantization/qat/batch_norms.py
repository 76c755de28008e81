"""Batch normalization known by what a module computes, whatever its class: with an activation after it, too."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph.clone import copy_of
from ..graph.example_run import random_state_kept
from ..int8.folding import BATCH_NORMS

_TENSORS = ("running_mean", "running_var", "weight", "bias")
_TRAINS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class EvaluationForm(NamedTuple):
    """What a module computes in evaluation: batch normalization by its own ``running_mean``, ``running_var``,
    ``weight``, ``bias`` and ``eps``, and what follows.

    Attributes:
        activation: the module that follows; None for nothing.
        name: its name among the module's submodules; None where the code calls a function.
        trains_plainly: training, too, is that of PyTorch's batch normalization and then the activation.
    """

    activation: nn.Module | None = None
    name: str | None = None
    trains_plainly: bool = False


class Normalization(nn.Module):
    """The normalization alone of a batch normalization that does more, on that module's tensors.

    Args:
        module: an instance of one of PyTorch's classes, whose ``training`` and settings count.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # In a tuple so that nn.Module does not register it: it is registered elsewhere, and its tensors once.
        self.module = (module,)
        self.train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *size) to the same shape."""
        freeze_if_scheduled(self.module[0])
        return nn.BatchNorm2d.forward(self.module[0], input)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self.__dict__:
                raise
            return getattr(self.__dict__["module"][0], name)


def plain_batch_norm(module: nn.Module | None) -> nn.Module | None:
    """The batch normalization whose class is PyTorch's own and whose forward is what the module computes in either
    mode; None where there is none."""
    if isinstance(module, Normalization):
        return module.module[0]
    if isinstance(module, BATCH_NORMS) and type(module).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward):
        return module
    return None


def use_running_statistics(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a batch normalization that :class:`.QATSchedule` has frozen: the next ``model.train()`` would
    undo its evaluation mode."""
    module.training = False


def freeze_if_scheduled(module: nn.Module) -> None:
    """Does what that hook does, for a batch normalization that is computed without a call of the module."""
    if any(hook is use_running_statistics for hook in module._forward_pre_hooks.values()):
        use_running_statistics(module, ())


_forms: weakref.WeakKeyDictionary[nn.Module, EvaluationForm | None] = weakref.WeakKeyDictionary()


def evaluation_form(module: nn.Module) -> EvaluationForm | None:
    """The form of a module that is batch normalization in evaluation; None for any other.

    It is found out by trial, on a copy with other statistics and parameters, and remembered.
    """
    if plain_batch_norm(module) is not None:
        return EvaluationForm(trains_plainly=True)
    if not isinstance(getattr(module, "running_mean", None), Tensor):
        return None
    if not all(hasattr(module, name) for name in (*_TENSORS, "eps")):
        return None
    if module not in _forms:
        with random_state_kept():
            torch.manual_seed(0)
            _forms[module] = _tried_form(module)
    return _forms[module]


def _tried_form(module: nn.Module) -> EvaluationForm | None:
    probe: Any = copy_of(module).eval()
    deviation = probe.eps**0.5
    # Deviations so small that eps counts, and means of their size; inputs from a tenth to a thousand of them, so that
    # whatever clips or saturates after the normalization shows.
    with torch.no_grad():
        for name in _TENSORS:
            tensor = getattr(probe, name)
            if isinstance(tensor, Tensor):
                values = torch.randn_like(tensor)
                if name == "running_mean":
                    values *= deviation
                elif name == "running_var":
                    values = torch.rand_like(tensor) * 9 * probe.eps
                elif name == "weight":
                    values += values.sign()
                tensor.copy_(values)
    for batch, *size in ((4, 3, 3), (9, 4), (36,), (4, 2, 2, 2)):
        shape = (batch, len(probe.running_mean), *size)
        input = 10 ** (torch.rand(shape) * 4 - 1) * torch.randn(shape).sign()
        input = input.to(probe.running_mean) * deviation
        try:
            with torch.no_grad():
                output = probe(input.clone())
        except Exception:  # a module may refuse inputs of another number of axes in any way
            continue
        form = _form(probe, input, output)
        if form is None:
            return None
        activation = form.activation if form.name is None else module.get_submodule(form.name)
        return EvaluationForm(activation, form.name, _trains_plainly(probe, form, input))
    return None


def _form(probe: Any, input: Tensor, output: Any) -> EvaluationForm | None:
    if not isinstance(output, Tensor) or output.shape != input.shape:
        return None
    tensors = {name: getattr(probe, name) for name in _TENSORS}
    normalized = F.batch_norm(input, eps=probe.eps, **tensors)
    candidates = [EvaluationForm()]
    candidates += [
        EvaluationForm(child, name)
        for name, child in probe.named_modules()
        if name and next(child.children(), None) is None
    ]
    candidates += [EvaluationForm(activation) for activation in (nn.ReLU(), nn.ReLU6(), nn.SiLU())]
    for form in candidates:
        try:
            with torch.no_grad():
                expected = normalized if form.activation is None else form.activation(normalized.clone())
        except Exception:  # a child that takes something else
            continue
        # Frozen batch normalization written out multiplies in another order than PyTorch's kernel.
        is_same = isinstance(expected, Tensor) and expected.shape == output.shape
        if is_same and torch.allclose(output, expected, rtol=1e-4, atol=1e-4):
            return form
    return None


def _trains_plainly(probe: nn.Module, form: EvaluationForm, input: Tensor) -> bool:
    """Whether two steps of training leave the same results, statistics and gradients as PyTorch's class does."""
    if not isinstance(probe, _TRAINS):
        return False
    results = []
    for plain in (False, True):
        module = copy_of(probe).train()
        activation = form.activation if form.name is None else module.get_submodule(form.name)
        found: list[Any] = []
        for batch in (input, input * 2 + 1):
            batch = batch.detach().clone().requires_grad_()
            try:
                if plain:
                    output = nn.BatchNorm2d.forward(module, batch)  # type: ignore[arg-type]
                    output = output if activation is None else activation(output)
                else:
                    output = module(batch)
                torch.autograd.backward(output.square().sum())
            except Exception:  # code that does not train on this example
                return False
            found += [output.detach(), batch.grad]
        found += [*module.buffers(), *(parameter.grad for parameter in module.parameters())]
        results.append(found)
    return all(_same(one, other) for one, other in zip(*results, strict=True))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
