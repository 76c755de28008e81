"""A module whose forward a graph describes is still the module it was."""

from __future__ import annotations

import copy
import inspect
import pickle
import traceback

import pytest
import torch
from torch import Tensor, fx, nn

from example_architectures import SmallResNet, TextClassifier
from mlframework.quantization.graph.containers import graph_of
from mlframework.quantization.graph.generated_forward import (
    generated_class,
    has_generated_forward,
    set_forward,
    source_of,
    write_code,
)
from mlframework.quantization.graph.tracing import trace
from mlframework.quantization.graph.unflattening import set_forwards

X = torch.randn(4, 3)


class Doubles(nn.Module):
    """Twice what its layer says."""

    limit = 3

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x)) * 2

    def greet(self) -> str:
        return f"{type(self).__name__} of {self.limit}"


def generated(model: nn.Module, *args: Tensor) -> nn.Module:
    outcome = trace(model, args, {}, lambda module: False)
    assert outcome.graph is not None
    set_forwards(model, outcome.graph, outcome.given)
    return model


def test_the_graph_is_what_runs() -> None:
    model = Doubles()
    graph = fx.Tracer().trace(model)
    for node in graph.find_nodes(op="call_function", target=torch.relu):
        node.target = torch.sigmoid
    inputs = torch.randn(4, 3)
    expected = torch.sigmoid(model.layer(inputs)) * 2
    set_forward(model, graph)
    assert torch.equal(model(inputs), expected)


def test_class_names_methods_and_documentation_stay() -> None:
    model = generated(Doubles(), X)
    assert isinstance(model, Doubles)
    assert type(model).__name__ == "Doubles"
    assert type(model).__qualname__ == "Doubles"
    assert type(model).__module__ == Doubles.__module__
    assert type(model).__doc__ == Doubles.__doc__
    assert model.greet() == "Doubles of 3"
    assert repr(model) == repr(Doubles())


def test_other_models_of_the_class_keep_their_forward() -> None:
    other, inputs = Doubles(), torch.randn(4, 3)
    expected = other(inputs)
    assert has_generated_forward(generated(Doubles(), X))
    assert not has_generated_forward(other)
    assert torch.equal(other(inputs), expected)


def test_setting_it_again_does_not_pile_up_classes() -> None:
    model = generated(Doubles(), X)
    set_forwards(model, graph_of(model), source_of(model).given[0])
    assert type(model).__bases__ == (Doubles,)


def test_its_graph_can_be_taken_down_again() -> None:
    model = generated(SmallResNet(), torch.randn(2, 3, 8, 8))
    graph = graph_of(model)
    assert [str(node.target) for node in graph.nodes if node.op == "call_module"][:3] == ["stem", "bn", "relu"]
    inputs = torch.randn(2, 3, 8, 8)
    model.eval()
    expected = model(inputs)
    set_forwards(model, graph, source_of(model).given[0])
    assert torch.equal(model(inputs), expected)


def test_buffers_and_parameters_are_read_where_they_are() -> None:
    model, tokens = TextClassifier(), torch.randint(20, (2, 6))
    generated(model, tokens)
    before = model(tokens)
    model.indices.copy_(model.indices.flip(0))
    assert not torch.equal(model(tokens), before)


def test_only_a_generated_forward_has_a_graph() -> None:
    with pytest.raises(TypeError, match=r"module must be what set_forwards\(\) was given, got Doubles"):
        graph_of(Doubles())


def test_copies_carry_it_along() -> None:
    model, inputs = generated(SmallResNet().eval(), torch.randn(2, 3, 8, 8)), torch.randn(2, 3, 8, 8)
    expected = model(inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert has_generated_forward(other)
        assert isinstance(other, SmallResNet)
        assert torch.equal(other(inputs), expected)
        assert other.features() == model.features()
    deep = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(model))))
    assert torch.equal(deep(inputs), expected)


def test_a_traceback_shows_the_generated_line() -> None:
    model = generated(Doubles(), X)
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(4, 5))
    text = "".join(traceback.format_exception(caught.value))
    assert "of Doubles>" in text
    assert "self._modules['layer'](x)" in text


def test_hooks_of_the_module_fire() -> None:
    model, calls = generated(Doubles(), X), []
    model.register_forward_hook(lambda module, args, output: calls.append("root"))
    model.layer.register_forward_hook(lambda module, args, output: calls.append("layer"))
    model(torch.randn(4, 3))
    assert calls == ["layer", "root"]


def to_be_written(model: nn.Module) -> nn.Module:
    """The same, with forwards of which there are only the graphs."""
    for module in model.modules():
        if has_generated_forward(module):
            source = source_of(module)._replace(text=None, names={})
            module.__class__ = generated_class(type(module).__bases__[0], source)
    return model


def test_a_forward_is_written_when_it_is_called_and_computes_the_same() -> None:
    model, inputs = generated(SmallResNet().eval(), torch.randn(2, 3, 8, 8)), torch.randn(2, 3, 8, 8)
    expected = model(inputs)
    for copies in (lambda each: each, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        other = copies(to_be_written(model))
        forward = type(other).forward
        assert list(inspect.signature(other.forward).parameters) == ["x"]
        assert torch.equal(other(inputs), expected)
        assert type(other).forward is forward
        assert torch.equal(copy.deepcopy(other)(inputs), expected)


def test_what_is_still_to_be_written_is_compiled_whole() -> None:
    model, inputs = generated(SmallResNet().eval(), torch.randn(2, 3, 8, 8)), torch.randn(2, 3, 8, 8)
    expected = model(inputs)
    compiled = torch.compile(to_be_written(model), backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs), expected)


def test_the_text_of_a_call_may_look_like_a_call_of_a_module() -> None:
    """Submodules are read where they are kept: in statements, and not in text."""
    model = Doubles()
    graph = fx.Tracer().trace(model)
    output = next(iter(graph.find_nodes(op="output")))
    with graph.inserting_before(output):
        graph.call_function(torch._assert, (True, " self.layer(x)"))
    set_forward(model, graph)
    assert "' self.layer(x)'" in str(source_of(model).text)
    assert torch.equal(model(X), Doubles.forward(model, X))
    write_code(model)  # which is
