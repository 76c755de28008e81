"""Every network of the zoo through the whole path: prepare, train, evaluate, convert."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from example_networks import EVERY_NETWORK, named
from mlframework.quantization import PreparationReport, QATConfig, convert, preparation_report, prepare
from mlframework.quantization.int8.integer_module import IntegerModule
from zoo import NETWORKS, logits_of, roughen_batch_norms, train_steps, zero_some_gammas

pytestmark = pytest.mark.slow

TRANSFORMERS = [named(name) for name in NETWORKS if name.startswith("transformers_")]
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)


class Outcome(NamedTuple):
    network: nn.Module
    prepared: nn.Module
    converted: nn.Module
    report: PreparationReport
    losses: list[float]


@cache
def outcome_of(name: str) -> Outcome:
    """The float network, and what became of it: ten steps with quantization, from batch norms of every kind."""
    network = NETWORKS[name]
    model = network.make()
    roughen_batch_norms(model)
    prepared = prepare(model, QATConfig(), network.example_inputs(2))
    losses = train_steps(prepared, network, steps=10)
    zero_some_gammas(prepared)
    prepared.eval()
    return Outcome(model, prepared, convert(prepared), preparation_report(prepared), losses)


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@EVERY_NETWORK
@pytest.mark.parametrize("size", [1, 32])
def test_converted_network_gives_what_the_prepared_one_gives(name: str, size: int) -> None:
    outcome = outcome_of(name)
    inputs = NETWORKS[name].example_inputs(size, seed=7)
    with torch.no_grad():
        prepared, converted = outcome.prepared(*inputs), outcome.converted(*inputs)
    assert type(prepared) is type(converted)
    assert tensors_of(prepared)
    for one, other in zip(tensors_of(prepared), tensors_of(converted), strict=True):
        assert torch.equal(one, other)
    assert logits_of(converted).std() > 0


@EVERY_NETWORK
def test_training_is_finite_and_starts_near_the_float_network(name: str) -> None:
    """The losses are means over a batch: eight bits move them by hundredths."""
    losses = outcome_of(name).losses
    network = NETWORKS[name]
    model = network.make()
    roughen_batch_norms(model)
    first = train_steps(model, network, steps=1)[0]
    assert all(0 < loss < 20 for loss in losses)
    assert losses[0] == pytest.approx(first, abs=0.15)


@EVERY_NETWORK
def test_gammas_of_every_kind_were_folded(name: str) -> None:
    gammas = [module.weight for module in outcome_of(name).prepared.modules() if isinstance(module, _BatchNorm)]
    if gammas:
        together = torch.cat(gammas)
        assert (together < 0).any()
        assert (together == 0).any()
        assert (together > 0).any()


@EVERY_NETWORK
def test_every_layer_with_weights_is_quantized(name: str) -> None:
    outcome = outcome_of(name)
    quantized = {entry.name for entry in outcome.report.quantized}
    layers = {name for name, module in outcome.network.named_modules() if isinstance(module, LAYERS)}
    assert layers
    assert layers <= quantized
    kinds = {entry.kind for entry in outcome.report.left_float}
    assert not kinds & {kind.__name__ for kind in LAYERS}
    assert not kinds & {"BatchNorm1d", "BatchNorm2d"}


@pytest.mark.parametrize("name", [named(name) for name, network in NETWORKS.items() if network.fully_integer])
def test_fully_integer_network_keeps_nothing_in_float(name: str) -> None:
    outcome = outcome_of(name)
    assert not outcome.report.left_float
    assert not list(outcome.converted.parameters())
    holders = [module for module in outcome.converted.modules() if list(module.buffers(recurse=False))]
    assert holders
    assert all(isinstance(module, IntegerModule) for module in holders)
    assert not any("alone" in entry.detail for entry in outcome.report.entries)


@pytest.mark.parametrize("name", ["gpt_tied", "vit"])
def test_report_lists_the_layer_norms_as_float(name: str) -> None:
    outcome = outcome_of(name)
    norms = [module for module in outcome.network.modules() if isinstance(module, nn.LayerNorm)]
    listed = [entry for entry in outcome.report.left_float if entry.kind == "LayerNorm"]
    assert len(listed) == len(norms) == 5
    assert not any("alone" in entry.detail for entry in outcome.report.entries)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_networks_are_called_as_before(name: str) -> None:
    """By keyword, with dataclasses for results."""
    outcome = outcome_of(name)
    inputs = NETWORKS[name].example_inputs(2, seed=3)
    first = outcome.network.main_input_name
    assert isinstance(first, str)
    named = dict(zip((first, "attention_mask"), inputs, strict=False))
    with torch.no_grad():
        by_keyword, by_position = outcome.prepared(**named), outcome.prepared(*inputs)
    assert type(by_keyword) is type(outcome.network(**named))
    assert torch.equal(by_keyword.logits, by_position.logits)
