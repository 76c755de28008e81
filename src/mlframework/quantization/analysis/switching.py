"""A prepared model with some of its nodes on and others off, or with weights of another width, for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..graph.example_run import state_kept
from ..graph.modes import in_evaluation
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.weight_range import weight_node
from .layer_groups import LayerGroup, output_axis

WeightNodes = Mapping[str, FakeQuantizeLayer]


@contextmanager
def in_analysis(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and without compilers, which would not see the hooks of an analysis.

    Afterwards modes, switches, buffers, attributes, hooks and the random state are as they were, also where an error or
    an interruption ends it.
    """
    # Setting it would import the compiler, without which nothing is compiled.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with eager, state_kept(model), in_evaluation(model):
        yield


def switch(model: nn.Module, *, on: bool) -> None:
    """Switches every node of the model. (Inside :func:`in_analysis`, which switches them back.)"""
    for module in model.modules():
        if isinstance(module, FakeQuantizeLayer):
            module.fake_quantize_enabled = on


def nodes_of_width(group: LayerGroup, weights: Mapping[str, Tensor], bits: int) -> dict[str, FakeQuantizeLayer]:
    """A weight node of that width for every wrapper of the group, by the wrapper's name: the model's own node where it
    has that width already (its scale may be a learned one), else one on the range that the weight has now.

    Args:
        group: the layer.
        weights: what the wrappers are called with, by their names.
        bits: of the codes.
    """
    made: dict[int, FakeQuantizeLayer] = {}
    nodes = {}
    for name, wrapper in group.wrappers.items():
        own = wrapper.weight_fake_quantize
        assert own is not None
        if id(own) not in made:
            made[id(own)] = own if own.scheme.bits == bits else _node_of_width(wrapper, weights[name], bits)
        nodes[name] = made[id(own)]
    return nodes


def _node_of_width(wrapper: QATModuleWrapper, weight: Tensor, bits: int) -> FakeQuantizeLayer:
    config = replace(wrapper.quantization_config, weight_bits=bits, learnable=False)
    node = weight_node(weight.detach(), config, output_axis(wrapper)).eval()
    node.observer.enabled = False  # the weight stays what it is
    return node


@contextmanager
def with_weight_nodes(wrappers: Mapping[str, QATModuleWrapper], nodes: WeightNodes) -> Iterator[None]:
    """The wrappers with these nodes, by name, for their weights'."""
    own = {name: wrapper.weight_fake_quantize for name, wrapper in wrappers.items()}
    try:
        for name, wrapper in wrappers.items():
            wrapper.weight_fake_quantize = nodes[name]
        yield
    finally:
        for name, wrapper in wrappers.items():
            wrapper.weight_fake_quantize = own[name]


@contextmanager
def at_width(groups: tuple[LayerGroup, ...], nodes: Mapping[str, WeightNodes]) -> Iterator[None]:
    """Every layer with weight nodes of its group, by the group's name, and all nodes on."""
    with ExitStack() as stack:
        for group in groups:
            stack.enter_context(with_weight_nodes(group.wrappers, nodes[group.name]))
        yield


@contextmanager
def left_float(group: LayerGroup) -> Iterator[None]:
    """A layer's weights switched off, and its inputs where nothing else reads them."""
    nodes = [node for node in (*group.weight_nodes, *group.own_inputs) if node.fake_quantize_enabled]
    try:
        for node in nodes:
            node.fake_quantize_enabled = False
        yield
    finally:
        for node in nodes:
            node.fake_quantize_enabled = True
