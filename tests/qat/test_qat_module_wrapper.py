"""The wrapper stands in its layer's place: parameters, names, attributes, and the same numbers when switched off."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from example_layers import EVERY_LAYER, EVERY_PRODUCT, LayerExample, nodes_of, wrapped
from mlframework.quantization import QATConfig, QATModuleWrapper

NODES = ("input_fake_quantize", "weight_fake_quantize", "output_fake_quantize")


@EVERY_LAYER
def test_layer_and_parameters_are_the_users_own(example: LayerExample) -> None:
    layer = example.make()
    parameters, keys = dict(layer.named_parameters()), list(layer.state_dict())
    wrapper = QATModuleWrapper(layer)
    assert wrapper.layer is layer
    assert all(parameter is parameters[name] for name, parameter in wrapper.named_parameters())
    assert list(dict(wrapper.named_parameters())) == list(parameters)
    assert list(wrapper.state_dict())[: len(keys)] == keys
    assert all(key.startswith(NODES) for key in list(wrapper.state_dict())[len(keys) :])
    assert list(layer.state_dict()) == keys


@EVERY_LAYER
def test_learned_scales_come_after_the_layers_parameters(example: LayerExample) -> None:
    wrapper = QATModuleWrapper(example.make(), QATConfig(learnable=True))
    names = [name for name, _ in wrapper.named_parameters()]
    assert names[0] == "weight"
    assert {"weight_fake_quantize.scale", "output_fake_quantize.scale"} <= set(names)
    observed = QATModuleWrapper(example.make(), QATConfig())
    assert set(wrapper.state_dict()) == set(observed.state_dict())


@EVERY_LAYER
def test_an_optimizer_made_before_trains_it(example: LayerExample) -> None:
    layer = example.make()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    wrapper = QATModuleWrapper(layer)
    before = layer.weight.detach().clone()
    wrapper(*example.inputs()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(wrapper.weight, before)
    assert wrapper.weight is layer.weight
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_an_embedding_trains() -> None:
    wrapper = QATModuleWrapper(nn.Embedding(10, 4, padding_idx=0))
    wrapper(torch.tensor([[0, 3], [3, 4]])).sum().backward()
    gradient = wrapper.weight.grad
    assert gradient[3].count_nonzero() == 4
    assert gradient[[0, 1]].count_nonzero() == 0


@EVERY_LAYER
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("how", ["disabled", "none"])
def test_switched_off_it_is_the_layer_bit_for_bit(example: LayerExample, mode: bool, gradients: bool, how: str) -> None:
    layer = example.make().train(mode)
    wrapper = QATModuleWrapper(layer)
    for name in NODES:
        node = getattr(wrapper, name)
        if how == "none" or node is None:
            setattr(wrapper, name, None)
        else:
            node.fake_quantize_enabled = False
    inputs = example.inputs()
    with torch.set_grad_enabled(gradients):
        assert torch.equal(wrapper(*inputs), layer(*inputs))


@EVERY_PRODUCT
def test_switched_off_batch_norm_and_activation_run_as_they_are(example: LayerExample) -> None:
    assert example.batch_norm is not None
    layer, batch_norm, activation = example.make(), example.batch_norm(), nn.ReLU6()
    expected = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(batch_norm), nn.ReLU6())
    wrapper = QATModuleWrapper(layer, batch_norm=batch_norm, activation=activation)
    for node in nodes_of(wrapper):
        node.fake_quantize_enabled = False
    inputs = example.inputs()
    assert torch.equal(wrapper(*inputs), expected(*inputs))
    assert torch.equal(batch_norm.running_var, expected[1].running_var)


def test_attributes_pass_through() -> None:
    layer = nn.Conv2d(3, 4, (3, 5), stride=2, bias=False)
    layer.note = "mine"
    wrapper = QATModuleWrapper(layer)
    assert wrapper.kernel_size == (3, 5)
    assert wrapper.stride == (2, 2)
    assert wrapper.in_channels == 3
    assert wrapper.note == "mine"
    assert wrapper.bias is None
    assert wrapper.weight is layer.weight
    assert QATModuleWrapper(nn.Linear(3, 2)).in_features == 3
    with pytest.raises(AttributeError, match="unheard_of"):
        _ = wrapper.unheard_of


def test_a_new_parameter_reaches_the_layer() -> None:
    wrapper = QATModuleWrapper(nn.Linear(3, 2))
    wrapper.weight = nn.Parameter(torch.ones(2, 3))
    assert wrapper.layer.weight is wrapper.weight


@EVERY_LAYER
def test_train_and_eval_reach_the_layer(example: LayerExample) -> None:
    wrapper = QATModuleWrapper(example.make().eval())
    assert not wrapper.training
    for mode in (True, False):
        assert wrapper.train(mode) is wrapper
        assert wrapper.layer.training is wrapper.training is mode
        assert all(node.training is mode for node in nodes_of(wrapper))


@EVERY_LAYER
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casting_keeps_scales_in_float32(example: LayerExample, dtype: torch.dtype) -> None:
    wrapper = wrapped(example).to(dtype)
    assert wrapper.weight.dtype is wrapper.layer.weight.dtype is dtype
    assert all(node.scale.dtype is node.zero_point.dtype is torch.float32 for node in nodes_of(wrapper))
    inputs = [value.to(dtype) if value.is_floating_point() else value for value in example.inputs()]
    assert wrapper.train()(*inputs).dtype is dtype
    with torch.no_grad():
        assert wrapper.eval()(*inputs).dtype is dtype


@EVERY_LAYER
def test_copies_are_whole_and_apart(example: LayerExample) -> None:
    wrapper = wrapped(example)
    inputs = example.inputs()
    with torch.no_grad():
        expected = wrapper(*inputs)
        for other in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
            assert torch.equal(other(*inputs), expected)
            assert other.weight is other.layer.weight
            assert other.weight is not wrapper.weight
            other.weight.mul_(0.5)
            assert not torch.equal(other(*inputs), expected)
        assert torch.equal(wrapper(*inputs), expected)


@EVERY_LAYER
@pytest.mark.parametrize("learnable", [False, True], ids=["observed", "learnable"])
def test_a_checkpoint_restores_it(example: LayerExample, learnable: bool) -> None:
    wrapper, fresh = (
        wrapped(example, QATConfig(learnable=learnable)),
        QATModuleWrapper(example.make(), QATConfig(learnable=learnable)).eval(),
    )
    saved = io.BytesIO()
    torch.save(wrapper.state_dict(), saved)
    saved.seek(0)
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    inputs = example.inputs()
    with torch.no_grad():
        assert torch.equal(fresh(*inputs), wrapper(*inputs))


def test_a_layers_own_checkpoint_loads() -> None:
    layer, wrapper = nn.Linear(3, 2), QATModuleWrapper(nn.Linear(3, 2))
    outcome = wrapper.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(wrapper.weight, layer.weight)
    assert not outcome.unexpected_keys
    assert all(key.startswith(NODES) for key in outcome.missing_keys)


def test_a_state_of_another_scheme_is_refused() -> None:
    state = QATModuleWrapper(nn.Linear(3, 2), QATConfig(weight_bits=4)).state_dict()
    with pytest.raises(RuntimeError, match="int4"):
        QATModuleWrapper(nn.Linear(3, 2)).load_state_dict(state)


class _OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LayerNorm(3), "layer must be one of Linear"),
        (nn.EmbeddingBag(3, 2), "layer must be one of"),
        (_OwnForward(3, 2), "layer must be one of"),
        ("conv1", "layer must be one of"),
        (nn.ConvTranspose2d(4, 4, 3, groups=2), "groups"),
        (nn.Embedding(4, 2, max_norm=1.0), "max_norm"),
    ],
    ids=["layer norm", "bag", "own forward", "no module", "grouped transposed", "max norm"],
)
def test_what_cannot_be_quantized_is_refused(layer: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        QATModuleWrapper(layer)


def test_an_embedding_with_sparse_gradients_is_refused() -> None:
    with pytest.raises(TypeError, match="sparse"):
        QATModuleWrapper(nn.Embedding(10, 4, sparse=True))


def test_a_weight_that_an_unknown_hook_computes_is_refused() -> None:
    layer = nn.Linear(3, 2)
    layer.raw = layer._parameters.pop("weight")
    layer.weight = torch.zeros(2, 3)
    layer.register_forward_pre_hook(lambda module, args: setattr(module, "weight", module.raw * 2))
    with pytest.raises(TypeError, match="a hook computes its weight: register a parametrization"):
        QATModuleWrapper(layer)


def test_a_lazy_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="run it once first"):
        QATModuleWrapper(nn.LazyLinear(3))


def test_a_plain_subclass_is_taken() -> None:
    class Named(nn.Linear):
        pass

    assert QATModuleWrapper(Named(3, 2)).out_features == 2


@pytest.mark.parametrize(
    ("layer", "batch_norm"),
    [
        (nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4)),
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        (nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4)),
        (nn.Embedding(3, 4), nn.BatchNorm1d(4)),
    ],
    ids=["dimensions", "no statistics", "group norm", "embedding"],
)
def test_what_does_not_fold_is_refused(layer: nn.Module, batch_norm: nn.Module) -> None:
    with pytest.raises(TypeError, match="does not fold"):
        QATModuleWrapper(layer, batch_norm=batch_norm)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.LeakyReLU(), nn.Sigmoid()], ids=lambda module: str(module))
def test_an_activation_that_does_more_than_clip_is_refused(activation: nn.Module) -> None:
    with pytest.raises(TypeError, match="activation must only clip"):
        QATModuleWrapper(nn.Linear(3, 2), activation=activation)


def test_its_representation_names_the_chain() -> None:
    wrapper = QATModuleWrapper(nn.Linear(3, 2), batch_norm=nn.BatchNorm1d(2), activation=nn.ReLU())
    assert "layer=Linear(in_features=3, out_features=2, bias=True) -> BatchNorm1d -> ReLU" in repr(wrapper)


def test_its_float_output_is_that_of_the_modules_by_themselves() -> None:
    layer, batch_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()
    batch_norm.running_mean = torch.randn(4)
    wrapper = QATModuleWrapper(layer, batch_norm=batch_norm, activation=nn.ReLU()).eval()
    called: list[int] = []
    layer.register_forward_hook(lambda *args: called.append(1))
    input, weight, bias = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4)
    expected = batch_norm(torch.nn.functional.conv2d(input, weight, bias)).relu()
    assert torch.equal(wrapper.float_output(input, weight, bias), expected)
    assert not called
    own_weight, own_bias = wrapper.parameters_of_call()
    assert own_weight is layer.weight
    assert own_bias is layer.bias


def test_it_keeps_what_it_was_made_with() -> None:
    config = QATConfig(weight_bits=3)
    assert QATModuleWrapper(nn.Linear(3, 2), config).quantization_config is config
