"""The networks of the zoo compute on a GPU the integers that they compute on the CPU."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gpu.moving import moved, on_cpu
from mlframework.quantization import QATConfig, convert, prepare
from mlframework.quantization.int8.integer_module import IntegerModule
from zoo import NETWORKS, logits_of, roughen_batch_norms, train_steps, zero_some_gammas

EVERY_NETWORK = pytest.mark.parametrize("name", NETWORKS)
STEPS, BATCH = 3, 16


class Outcome(NamedTuple):
    prepared: nn.Module
    converted: nn.Module


_outcomes: dict[str, Outcome] = {}


def outcome_of(name: str) -> Outcome:
    """Trained a little on the CPU, from batch norms of every kind."""
    if name not in _outcomes:
        network = NETWORKS[name]
        model = network.make()
        roughen_batch_norms(model)
        prepared = prepare(model, QATConfig(), network.example_inputs(2))
        train_steps(prepared, network, STEPS)
        zero_some_gammas(prepared)
        prepared.eval()
        _outcomes[name] = Outcome(prepared, convert(prepared))
    return _outcomes[name]


class Call(NamedTuple):
    """What an integer module was given, and what it gave."""

    name: str
    arguments: Any
    keywords: Any
    result: Any


def calls_of(converted: nn.Module, inputs: tuple[Tensor, ...]) -> list[Call]:
    """Every call of an integer module in a run on the CPU."""
    calls: list[Call] = []
    handles = [
        module.register_forward_hook(
            lambda module, arguments, keywords, result, name=name: calls.append(
                Call(name, arguments, keywords, tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, result))
            ),
            with_kwargs=True,
        )
        for name, module in converted.named_modules()
        if isinstance(module, IntegerModule)
    ]
    with torch.no_grad():
        converted(*inputs)
    for handle in handles:
        handle.remove()
    return calls


@EVERY_NETWORK
def test_each_integer_module_gives_the_codes_of_the_cpu(name: str, device: torch.device) -> None:
    """Of the same codes; what lies between integer layers is computed in float, and differs in its last bits."""
    converted = outcome_of(name).converted
    calls = calls_of(converted, NETWORKS[name].example_inputs(BATCH, seed=7))
    assert calls
    on_device = copy.deepcopy(converted).to(device)
    for call in calls:
        with torch.no_grad():
            module = on_device.get_submodule(call.name)
            actual = module(*moved(call.arguments, device), **{k: moved(v, device) for k, v in call.keywords.items()})
        for one, other in zip(tree_leaves(actual), tree_leaves(call.result), strict=True):
            if isinstance(other, Tensor):
                assert one.dtype is other.dtype, call.name
                assert torch.equal(on_cpu(one), other), f"{call.name}, a {type(module).__name__}"


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.fully_integer])
@pytest.mark.parametrize("which", ["prepared", "converted"])
def test_moved_network_gives_what_it_gave(name: str, which: str, device: torch.device) -> None:
    model: nn.Module = getattr(outcome_of(name), which)
    inputs = NETWORKS[name].example_inputs(BATCH, seed=7)
    with torch.no_grad():
        expected = logits_of(model(*inputs)).clone()
        actual = logits_of(copy.deepcopy(model).to(device)(*moved(inputs, device)))
    assert torch.equal(on_cpu(actual), expected)
    assert expected.std() > 0


@EVERY_NETWORK
def test_converted_network_gives_what_the_prepared_one_gives(name: str, device: torch.device) -> None:
    outcome = outcome_of(name)
    inputs = moved(NETWORKS[name].example_inputs(BATCH, seed=7), device)
    with torch.no_grad():
        one, other = (logits_of(copy.deepcopy(model).to(device)(*inputs)) for model in outcome)
    assert torch.equal(one, other)
    assert one.isfinite().all()
