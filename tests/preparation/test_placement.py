"""Every tensor that enters a quantized operation is quantized exactly once, and where the rules say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from example_architectures import BranchesAtRoot, conv
from example_models import EXAMPLES, Example, train_briefly
from mlframework.quantization import FakeQuantizeLayer, QATConfig, QATModuleWrapper, calibrate, convert, prepare
from mlframework.quantization.graph.containers import graph_of
from mlframework.quantization.graph.generated_forward import has_generated_forward
from mlframework.quantization.int8.lookup import Lookup
from mlframework.quantization.qat.qat_operation import QATOperation
from placement_probes import IMAGES, Runs, free_nodes, joined, output, placed, source, sums

TRACED = {name: example for name, example in EXAMPLES.items() if name not in ("branches at root", "single layer")}


@pytest.mark.parametrize("example", TRACED.values(), ids=TRACED)
def test_what_enters_a_layer_is_on_the_grid_of_its_source(example: Example) -> None:
    """Each tensor is fake-quantized by the very node that the layer takes its grid from, and by no other after it."""
    prepared = prepare(example.make(), QATConfig(), example.inputs())
    train_briefly(prepared, example.inputs(6), steps=2)
    prepared.eval()
    assert has_generated_forward(prepared)
    seen: list[str] = []

    def check(name: str, index: int, node: FakeQuantizeLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(name)
            assert torch.equal(node(args[index]), args[index])

        return hook

    for name, module in prepared.named_modules():
        if isinstance(module, QATModuleWrapper) and module.input_source not in (None, module.input_fake_quantize):
            module.register_forward_pre_hook(check(name, 0, module.input_source))
        if isinstance(module, QATOperation):
            for index, node in enumerate(module.sources):
                module.register_forward_pre_hook(check(name, index, node))
    prepared(*example.inputs())
    assert seen


@pytest.mark.parametrize("example", TRACED.values(), ids=TRACED)
def test_no_value_is_quantized_twice(example: Example) -> None:
    """No node reads, through operations that keep values, what another node has put on a grid."""
    prepared = prepare(example.make(), None, example.inputs())
    modules = dict(prepared.named_modules())

    def gives_grid(node: fx.Node) -> bool:
        module = modules.get(str(node.target))
        return isinstance(module, FakeQuantizeLayer) or getattr(module, "output_fake_quantize", None) is not None

    for node in graph_of(prepared).nodes:
        if isinstance(modules.get(str(node.target)), FakeQuantizeLayer):
            assert not gives_grid(node.args[0])
            assert len([user for user in node.args[0].users if gives_grid(user)]) == 1


@pytest.mark.parametrize("example", TRACED.values(), ids=TRACED)
def test_every_reached_layer_computes_on_integers_in_evaluation(example: Example) -> None:
    prepared = prepare(example.make(), None, example.inputs())
    train_briefly(prepared, example.inputs(6), steps=1)
    prepared.eval()
    with torch.no_grad():
        for module in prepared.modules():
            if isinstance(module, QATModuleWrapper) and not isinstance(module.layer, nn.Embedding):
                assert module.computes_integers
            if isinstance(module, QATOperation):
                assert module.computes_integers


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 2), F.relu, F.relu6, torch.relu])
def test_a_chain_is_quantized_at_its_end(relu: Any) -> None:
    modules = {"relu": relu} if isinstance(relu, nn.Module) else {}
    model = placed(
        lambda self, x: self.last((self.relu if modules else relu)(self.bn(self.first(x)))),
        first=conv(3, 4),
        bn=nn.BatchNorm2d(4),
        last=conv(4, 2),
        **modules,
    )
    assert free_nodes(model) == ["x_fake_quantize"]
    assert model.first.following[0] is model.bn
    assert len(model.first.following) == 2
    assert source(model, "last") is output(model, "first")
    scheme = output(model, "first").scheme
    assert (scheme.signed, scheme.symmetric_zero_point, scheme.symmetric) == (False, scheme.quant_min, True)


def test_without_a_relu_the_grid_holds_both_signs() -> None:
    model = placed(lambda self, x: self.last(self.first(x)), first=conv(3, 4), last=conv(4, 2))
    assert not output(model, "first").scheme.symmetric


def test_a_chain_ends_where_something_else_reads_it() -> None:
    model = placed(
        lambda self, x: (lambda y: self.last(F.relu(self.bn(y))) + self.last(y))(self.first(x)),
        first=conv(3, 4),
        bn=nn.BatchNorm2d(4),
        last=conv(4, 2),
    )
    assert model.first.following == ()


@pytest.mark.parametrize("activation", [nn.GELU(), nn.LeakyReLU(), nn.Sigmoid()], ids=str)
def test_other_activations_are_tables(activation: nn.Module) -> None:
    model = placed(
        lambda self, x: self.last(self.activation(self.first(x))),
        first=conv(3, 4),
        activation=activation,
        last=conv(4, 2),
    )
    assert free_nodes(model) == ["x_fake_quantize"]
    (table,) = joined(model, Lookup)
    assert table.sources == (output(model, "first"),)
    assert source(model, "last") is table.output_fake_quantize
    scheme = table.output_fake_quantize.scheme
    assert scheme.symmetric is isinstance(activation, nn.Sigmoid)  # which is never negative


def test_every_call_site_has_a_node_of_its_own() -> None:
    model = prepare(EXAMPLES["called twice"].make(), None, (IMAGES,))
    assert model.conv.layer is model.conv_call.layer
    assert model.conv.weight is model.conv_call.weight
    assert model.conv.weight_fake_quantize is model.conv_call.weight_fake_quantize
    assert output(model, "conv") is not output(model, "conv_call")
    assert source(model, "conv_call") is output(model, "conv")
    assert source(model, "last") is output(model, "conv_call")


def test_the_last_linear_stays_float_and_the_last_convolution_does_not() -> None:
    model = nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 2), nn.Identity())
    prepared = prepare(model, None, (IMAGES,))
    assert output(prepared, "4") is None
    assert output(prepared, "2") is not None
    assert output(prepare(model, QATConfig(quantize_last_linear=True), (IMAGES,)), "4") is not None
    assert output(prepare(nn.Sequential(conv(3, 4)), None, (IMAGES,)), "0") is not None


def test_a_result_that_another_layer_reads_is_quantized() -> None:
    example = EXAMPLES["mlp"]
    model = Runs(
        lambda self, x: (lambda y: (y, self.last(y)))(self.first(x)), first=nn.Linear(5, 4), last=nn.Linear(4, 2)
    )
    prepared = prepare(model, None, example.inputs())
    assert source(prepared, "last") is output(prepared, "first")
    assert output(prepared, "last") is None


def test_in_a_model_that_is_not_traced_every_layer_has_its_own_nodes() -> None:
    model = prepare(BranchesAtRoot(), None, (IMAGES,))
    assert model.conv.input_fake_quantize is not None
    assert output(model, "conv") is not None
    assert output(model, "head") is None


def test_embeddings_quantize_their_table_alone() -> None:
    example = EXAMPLES["text"]
    model = prepare(example.make(), None, example.inputs())
    assert model.embedding.input_source is None
    assert model.embedding.weight_fake_quantize is not None
    assert output(model, "embedding") is output(model, "position") is None
    assert not sums(model)


class Residual(nn.Module):
    """As in a transformer that normalizes after its sums: what a linear layer reads, a sum reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.body(y)


def test_only_who_computes_on_integers_reads_a_grid() -> None:
    model = nn.Sequential(Residual(), Residual(), nn.Linear(6, 2))
    prepared = prepare(model, None, (torch.randn(4, 6),))
    # The residual sums, the normalizations and what linear layers add to the stream stay float.
    assert not sums(prepared)
    assert all(output(prepared, f"{block}.body.{layer}") is None for block in "01" for layer in "02")
    with torch.no_grad():
        calibrate(prepared, [torch.randn(64, 6)])
        x = torch.randn(16, 6)
        prepared.eval()
        seen = []
        handle = prepared[0].norm.register_forward_hook(lambda module, args, result: seen.append(result))
        result = prepared[0](x)
        handle.remove()
        assert torch.equal(result, seen[0] + prepared[0].body(seen[0]))
        assert torch.equal(convert(prepared)(x), prepared(x))


@pytest.mark.parametrize(
    "between", [nn.Dropout(), nn.Identity(), nn.Flatten(1)], ids=lambda module: type(module).__name__
)
def test_what_lies_between_a_value_and_its_readers_does_not_put_a_sum_on_a_grid(between: nn.Module) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.between(self.norm(x))
        return y + self.last(y)

    model = Runs(forward, norm=nn.LayerNorm(6), between=between, last=nn.Linear(6, 6))
    prepared = prepare(model, None, (torch.randn(4, 6),)).eval()
    calibrate(prepared, [torch.randn(64, 6)])
    x = torch.randn(8, 6)
    with torch.no_grad():
        value = model.eval().norm(x)
        assert torch.equal(prepared(x), value + prepared.last(value))
        assert torch.equal(convert(prepared)(x), prepared(x))


def test_a_part_of_a_value_has_a_grid_of_its_own() -> None:
    """The range of what is left out does not count."""
    model = placed(lambda self, x: self.last(torch.cat([x.cumsum(1), 100 * x], 1)[:, :3]), last=conv(3, 2))
    calibrate(model, [IMAGES])
    low, high = torch.cumsum(IMAGES, 1).aminmax()
    node = source(model, "last")
    assert node is not None
    assert node.scale.item() <= (high - low).item() / 255 * 1.01


def test_a_layer_called_with_more_than_its_input_stays_float() -> None:
    model = prepare(EXAMPLES["unet"].make(), None, (IMAGES,))
    assert type(model.up) is nn.ConvTranspose2d


def test_batch_norm_over_another_axis_does_not_fold() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(4, 2))
    prepared = prepare(model, None, (torch.randn(2, 3, 5),))
    assert prepared[0].following == ()
