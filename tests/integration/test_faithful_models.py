"""A prepared model does what the model does, whatever its code does beside computing values: with its nodes disabled,
to the last bit."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from example_effects import EFFECTS, PATCHES, WIDTH, Block, Model
from mlframework.quantization import FakeQuantizeLayer, QATConfig, calibrate, convert, preparation_report, prepare

pytestmark = pytest.mark.slow

SIZES = (6, 3)


def disable(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, FakeQuantizeLayer):
            module.fake_quantize_enabled = module.observer.enabled = False
    return model


class Run(NamedTuple):
    """All that a call of a model leaves behind."""

    output: Tensor
    gradients: dict[str, Tensor | None]
    kept: int
    draws: tuple[float, float]


def run(model: nn.Module, seed: int, x: Tensor, *args: Any, **kwargs: Any) -> Run:
    torch.manual_seed(seed)
    random.seed(seed)
    x = x.clone().requires_grad_()
    storages: dict[int, Any] = {}  # by address; held, so that no other takes it

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x, *args, **kwargs)
    draws = float(torch.rand([])), random.random()
    tensors = {"": x, **dict(model.named_parameters())}
    for tensor in tensors.values():
        tensor.grad = None
    (output.float() * torch.linspace(1, 2, output.numel()).view(output.shape)).sum().backward()
    kept = sum(storage.nbytes() for storage in storages.values())
    return Run(output, {name: tensor.grad for name, tensor in tensors.items()}, kept, draws)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def check(model: nn.Module) -> nn.Module:
    """Holds what is prepared of a model to the model; returns it, with its nodes disabled."""
    before = state_of(model)
    generators = torch.random.get_rng_state(), random.getstate()
    prepared = disable(prepare(model, QATConfig(), (torch.randn(SIZES[0], WIDTH, generator=torch.Generator()),)))
    assert torch.equal(torch.random.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert state_of(model) == before
    for mode in (True, False):
        model.train(mode)
        prepared.train(mode)
        for seed, size in enumerate(SIZES * 2):
            x = torch.randn(size, WIDTH)
            expected, actual = run(model, seed, x), run(prepared, seed, x)
            assert torch.equal(actual.output, expected.output)
            assert actual.draws == expected.draws
            assert actual.kept == expected.kept
            for name, gradient in expected.gradients.items():
                assert same(actual.gradients[name], gradient), name
            assert state_of(prepared).items() >= state_of(model).items()
    x, scale = torch.randn(SIZES[1], WIDTH), torch.rand(3)
    assert torch.equal(run(prepared, 9, x, scale).output, run(model, 9, x, scale).output)
    assert torch.equal(run(prepared, 9, x, offset=2.0).output, run(model, 9, x, offset=2.0).output)
    return prepared


@cache
def _prepared(effect: str) -> nn.Module:
    """Of a block with that effect; for tests that copy it, or leave it as it is."""
    return prepare(Model([Block(EFFECTS[effect])]), QATConfig(), (torch.randn(4, WIDTH),))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Buffers, and what blocks keep as attributes."""
    state: dict[str, Any] = {
        name: buffer.tolist() for name, buffer in model.named_buffers() if "fake_quantize" not in name
    }
    for name, module in model.named_modules():
        if isinstance(module, Block):
            state[f"{name}.count"], state[f"{name}.seen"] = module.count, list(module.seen)
            state[f"{name}.notes"] = module.notes.steps, list(module.notes.history["steps"])
    return state


EVERY_EFFECT = pytest.mark.parametrize("effect", EFFECTS)
EVERY_OTHER_EFFECT = pytest.mark.parametrize(
    "effect",
    [pytest.param(effect, marks=pytest.mark.long if index % 2 else ()) for index, effect in enumerate(EFFECTS)],
)


@EVERY_EFFECT
def test_what_code_does_beside_computing_values_it_still_does(effect: str) -> None:
    check(Model([Block(EFFECTS[effect])]))


@EVERY_OTHER_EFFECT
def test_it_does_so_under_autocast(effect: str) -> None:
    model = Model([Block(EFFECTS[effect])])
    prepared = disable(prepare(model, QATConfig(), (torch.randn(4, WIDTH),)))
    x = torch.randn(4, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = run(model, 0, x), run(prepared, 0, x)
    assert torch.equal(actual.output, expected.output)
    assert all(same(actual.gradients[name], gradient) for name, gradient in expected.gradients.items())


@EVERY_EFFECT
@pytest.mark.filterwarnings("ignore:no data reached blocks.0")  # what the effect does not call
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_its_evaluation_is_what_is_converted(effect: str) -> None:
    prepared = copy.deepcopy(_prepared(effect))
    calibrate(prepared, [torch.randn(8, WIDTH)])
    converted = convert(prepared)
    with torch.no_grad():
        for size in (4, 7):
            x = torch.randn(size, WIDTH)
            assert torch.equal(prepared.eval()(x), converted(x))


@EVERY_EFFECT
def test_only_the_module_that_does_it_runs_its_own_code(effect: str) -> None:
    alone = {entry.name for entry in preparation_report(_prepared(effect)).entries if "alone" in entry.detail}
    model, x = Model([Block(EFFECTS[effect])]), torch.randn(4, WIDTH)
    called: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: called.add(name))
    model.eval()(x)
    assert alone & called <= {"blocks.0.layer", "blocks.0.helper.layer"}


@st.composite
def models(draw: st.DrawFn) -> Model:
    effects = draw(st.lists(st.tuples(st.sampled_from(sorted(EFFECTS)), st.sampled_from(sorted(PATCHES))), max_size=3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return Model([PATCHES[patch](Block(EFFECTS[effect])) for effect, patch in effects])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@settings(max_examples=10)
@given(models())
def test_random_models(model: Model) -> None:
    check(model)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@settings(max_examples=500)
@given(models())
def test_many_random_models(model: Model) -> None:
    check(model)
