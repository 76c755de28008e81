"""A state dict is loaded whole, or refused by name with nothing of it loaded."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mlframework.quantization import (
    ActivationObserver,
    HistogramObserver,
    MinMaxObserver,
    QATConfig,
    calibrate,
    check_state,
    convert,
    prepare,
)

pytestmark = pytest.mark.slow

State = dict[str, Any]
INPUTS = torch.randn(16, 6)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))


@functools.cache
def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = {
        "learnable": QATConfig(learnable=True),
        "4 bits": QATConfig(weight_bits=4),
        "histogram": QATConfig(activation_observer=HistogramObserver),
    }.get(kind, QATConfig())
    model = prepare(network(), config, (INPUTS,))
    for _ in range(2):
        model(INPUTS)
    return convert(model) if kind == "converted" else model


def model_of(kind: str) -> nn.Module:
    return copy.deepcopy(_model(kind))


def fresh(kind: str) -> nn.Module:
    """Prepared alike, with other weights, and without data."""
    config = {"learnable": QATConfig(learnable=True), "4 bits": QATConfig(weight_bits=4)}.get(kind, QATConfig())
    torch.manual_seed(1)
    return prepare(network(), config, (INPUTS,))


def changed(state: State) -> State:
    """Another state that loads: what is left behind of it shows."""
    other = copy.deepcopy(dict(state))
    for name, value in other.items():
        if not name.endswith(("grid", "zero_point", "initialized")):
            value += 1
    return other


def assert_same(state: State, expected: State) -> None:
    assert state.keys() == expected.keys()
    for name, value in state.items():
        if isinstance(value, Tensor):
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name]), name
        else:
            assert value == expected[name]


def assert_refused(model: nn.Module, state: State, *parts: str, **options: Any) -> None:
    """With an error that says all of that."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="of which nothing was loaded") as caught:
        model.load_state_dict(state, **options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert_same(model.state_dict(), before)


WEIGHT_SCALE = "0.weight_fake_quantize.scale"
OBSERVER = "0.output_fake_quantize.observer"
# What is done to which tensor of which model, and what the error says beside its name.
TAMPERINGS: dict[str, tuple[str, str, Callable[[Tensor], Any], str]] = {
    "shape of a weight": ("observed", "3.weight", lambda value: value[:, :4], "size mismatch"),
    "shape of a scale": ("observed", WEIGHT_SCALE, lambda value: value[:4], "size mismatch"),
    "shape of statistics": ("observed", f"{OBSERVER}.statistics.minimum", lambda value: value.repeat(2), "size mism"),
    "no tensor": ("observed", "5.bias", lambda value: "bias", "expected torch.Tensor"),
    "None": ("learnable", WEIGHT_SCALE, lambda value: None, "expected torch.Tensor"),
    "codes for a weight": ("observed", "3.weight", lambda value: value.to(torch.int8), "floating-point dtype, got"),
    "complex weight": ("observed", "3.weight", lambda value: value.to(torch.complex64), "floating-point dtype, got"),
    "scale of integers": ("observed", WEIGHT_SCALE, lambda value: value.int() + 1, "floating-point dtype, got"),
    "count of floats": ("observed", f"{OBSERVER}.batches", lambda value: value.float(), "of dtype torch.int64, got"),
    "fractional count": ("observed", "1.num_batches_tracked", lambda value: value + 0.5, "dtype torch.int64, got"),
    "NaN scale": ("learnable", WEIGHT_SCALE, lambda value: value.index_fill(0, torch.tensor([6]), torch.nan), "nan"),
    "negative scale": ("learnable", WEIGHT_SCALE, lambda value: -value, "be finite and positive, got"),
    "scale that float32 rounds to 0": ("observed", WEIGHT_SCALE, lambda value: value.double() * 1e-60, "positive"),
    "zero point off the grid": ("learnable", "input_1_fake_quantize.zero_point", lambda value: value + 256, "to 255"),
    "zero point of a symmetric grid": (
        "observed",
        "3.weight_fake_quantize.zero_point",
        lambda value: value + 1,
        "be 0",
    ),
    "flag": ("observed", "0.weight_fake_quantize.initialized", lambda value: value * torch.nan, "be 0 or 1, got"),
    "negative count": ("observed", f"{OBSERVER}.batches", lambda value: -value, "not be negative, got [-3]"),
    "infinite extremes": ("histogram", f"{OBSERVER}.extremes", lambda value: value + torch.inf, "not be infinite"),
    "negative histogram": ("histogram", f"{OBSERVER}.counts", lambda value: value - 2, "not negative, got"),
    "other bits": ("observed", "3.weight_fake_quantize.grid", lambda value: value - torch.eye(6).long()[0], "int7"),
    "newer format": ("observed", "3.weight_fake_quantize.grid", lambda value: value + torch.eye(6).long()[5], "newer"),
    "no format": ("observed", "3.weight_fake_quantize.grid", lambda value: value * 0, "five integers"),
    "codes as floats": ("converted", "3.weight", lambda value: value.float(), "of dtype torch.int8, got"),
    "NaN scale of codes": ("converted", "0.output_scale", lambda value: value * torch.nan, "finite and positive"),
    "zero point of codes": ("converted", "0.input_zero_point", lambda value: value + 256, "lie on the grid"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampered_values(name: str) -> None:
    kind, key, tamper, message = TAMPERINGS[name]
    model = model_of(kind)
    state = changed(model.state_dict())
    state[key] = tamper(state[key])
    for strict in (True, False):
        assert_refused(model, state, key.removesuffix(".grid"), message, strict=strict)


@pytest.mark.parametrize("key", ["5.bias", WEIGHT_SCALE, f"{OBSERVER}.batches", "0.weight_fake_quantize.grid"])
def test_keys(key: str) -> None:
    model = model_of("observed")
    state = changed(model.state_dict())
    assert_refused(model, {**state, f"{key}s": torch.ones(1)}, "Unexpected key", f'"{key}s"')
    assert_refused(model, {name: value for name, value in state.items() if name != key}, "Missing key", f'"{key}"')


@pytest.mark.parametrize(
    ("kind", "other", "message"),
    [
        (
            "observed",
            "4 bits",
            "0.weight_fake_quantize quantized as int4 [-7, 7] symmetric, per channel 0, expected int8",
        ),
        (
            "4 bits",
            "observed",
            "0.weight_fake_quantize quantized as int8 [-127, 127] symmetric, per channel 0, expecte",
        ),
        ("observed", "converted", "Missing key"),
        ("converted", "learnable", "Missing key"),
    ],
)
def test_another_models_state(kind: str, other: str, message: str) -> None:
    assert_refused(model_of(kind), model_of(other).state_dict(), message)
    assert_refused(model_of(kind), network().state_dict(), "Missing key")


@settings(max_examples=20)
@given(st.data())
def test_any_change_of_a_state_is_refused_or_loaded_whole(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["observed", "learnable", "converted"]))
    model, changes = _model(kind), st.sampled_from(["drop", "rename", "shape", "dtype", "values"])
    before = copy.deepcopy(model.state_dict())
    state = changed(before)
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=2, unique=True)):
        how = data.draw(changes)
        if how == "drop":
            del state[key]
        elif how == "rename":
            state[key.replace("weight", "bias") + "_"] = state.pop(key)
        elif how == "shape":
            state[key] = state[key].repeat(2) if state[key].dim() == 1 else state[key].flatten()
        elif how == "dtype":
            dtypes = [torch.float64, torch.float16, torch.int8, torch.int64, torch.bool, torch.complex64]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an imaginary part that is lost
                state[key] = state[key].to(data.draw(st.sampled_from(dtypes)))
        else:
            state[key] = state[key] * data.draw(st.sampled_from([0, -1, 3, 1000]))
    try:
        model.load_state_dict(state)
    except RuntimeError:
        assert_same(model.state_dict(), before)
    else:
        assert state.keys() == before.keys()
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name].to(value.dtype)), name
        model.load_state_dict(before)


@pytest.mark.parametrize("source", ["observed", "learnable"])
@pytest.mark.parametrize("target", ["observed", "learnable"])
@pytest.mark.parametrize("file", [dict, lambda state: load(save(state))], ids=["dict", "safetensors"])
def test_it_loads_into_a_model_that_saw_no_data(source: str, target: str, file: Callable[[State], State]) -> None:
    model, other = model_of(source).eval(), fresh(target).eval()
    state = model.state_dict()
    assert str(other.load_state_dict(file(state), strict=True)) == "<All keys matched successfully>"
    assert_same(other.state_dict(), state)
    with torch.no_grad():
        assert torch.equal(other(INPUTS), model(INPUTS))
        assert torch.equal(convert(other)(INPUTS), model(INPUTS))


def test_a_state_without_a_version_loads() -> None:
    model, other = model_of("observed").eval(), fresh("observed").eval()
    state = {key: value[:5] if key.endswith("grid") else value for key, value in model.state_dict().items()}
    other.load_state_dict(state)
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["observed", "learnable", "converted"])
def test_tensors_that_are_assigned(kind: str) -> None:
    model = model_of(kind)
    state = copy.deepcopy(model.state_dict())
    key = "0.output_scale" if kind == "converted" else "0.output_fake_quantize.scale"
    assert_refused(model, {**changed(state), key: state[key].bfloat16()}, key, "float32 to be assigned", assign=True)
    assert_refused(model, {**changed(state), key: state[key] * torch.nan}, key, "finite", assign=True)
    with torch.no_grad():
        expected = model.eval()(INPUTS)
        for value in model.state_dict().values():
            value.zero_()
        model.load_state_dict(state, assign=True)
        assert torch.equal(model(INPUTS), expected)


def test_statistics_that_batches_with_infinite_values_leave_behind_load() -> None:
    """Averages of finite minima alone may pass those of finite maxima."""
    model = model_of("observed")
    state = model.state_dict()
    statistics = f"{OBSERVER}.statistics"
    model.load_state_dict({**state, f"{statistics}.minimum": state[f"{statistics}.maximum"] + 1})
    model(INPUTS)


# --- where the model stands, and what others' code does when it loads ------------------------------------------------


class Holder(nn.Module):
    """Holds two models."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = model_of(kind), model_of(kind)


@pytest.mark.parametrize(
    "wrap", [lambda model: model, functools.partial(torch.compile, backend="eager")], ids=["plain", "compiled"]
)
def test_models_inside_of_another_are_checked_on_their_own(wrap: Callable[[nn.Module], nn.Module]) -> None:
    holder = Holder("observed")
    wrapped = wrap(holder)
    before, state = copy.deepcopy(holder.state_dict()), changed(wrapped.state_dict())
    faulty = next(key for key in state if key.endswith(f"second.{WEIGHT_SCALE}"))
    with pytest.raises(RuntimeError, match=rf"nothing was loaded:\s+state_dict's .*second.{WEIGHT_SCALE}.*got \[-1.0"):
        wrapped.load_state_dict({**state, faulty: -torch.ones(8)})
    assert_same(holder.state_dict(), before)
    wrapped.load_state_dict(state)
    assert_same(wrapped.state_dict(), state)


class Head(nn.Linear):
    """Counts what it loads."""

    def get_extra_state(self) -> int:
        return 0

    def set_extra_state(self, state: int) -> None:
        self.loads = getattr(self, "loads", 0) + 1


def containers() -> dict[str, tuple[nn.Module, str]]:
    """Of a model and a head that comes later, and the path of the head."""
    return {
        "beside": (nn.Sequential(model_of("observed"), Head(2, 3)), "1"),
        "converted": (nn.Sequential(model_of("converted"), Head(2, 3)), "1"),
        "around": (nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), model_of("learnable")), "b": Head(2, 3)}), "b"),
    }


@pytest.mark.parametrize("name", containers())
def test_what_comes_after_a_model_is_checked_with_it(name: str) -> None:
    container, head = containers()[name]
    state = changed({key: value for key, value in container.state_dict().items() if not key.endswith("_extra_state")})
    state[f"{head}._extra_state"] = 0
    weight, bias = state[f"{head}.weight"], state.pop(f"{head}.bias")
    assert_refused(container, state, f'Missing key(s) in state_dict: "{head}.bias".')
    assert_refused(container, {**state, f"{head}.bias": bias, "more": bias}, 'Unexpected key(s) in state_dict: "more".')
    assert_refused(container, {**state, f"{head}.weight": weight.T}, f"size mismatch for {head}.weight", strict=False)
    assert not hasattr(container.get_submodule(head), "loads")
    # What PyTorch takes of a module that is none of ours.
    assert container.load_state_dict({**state, f"{head}.weight": weight.int()}, strict=False).missing_keys
    assert torch.equal(container.get_submodule(head).weight, weight.int())  # type: ignore[arg-type]
    assert container.get_submodule(head).loads == 1


def test_a_hook_of_what_comes_after_a_model_has_its_module_to_itself() -> None:
    """It is called with the module that is loaded, and once: as the load itself calls it."""
    head = nn.BatchNorm1d(3)
    calls = 0

    def fits(module: nn.Module, state: State, prefix: str, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        module.running_mean = torch.zeros_like(state[f"{prefix}running_mean"])

    head.register_load_state_dict_pre_hook(fits)
    container = nn.Sequential(model_of("observed"), head)
    state = {name: value.clone() for name, value in container.state_dict().items()}
    state["1.running_mean"] = torch.ones(3)
    container.load_state_dict(state)
    assert calls == 1
    assert torch.equal(head.running_mean, torch.ones(3))


def test_what_comes_before_a_model() -> None:
    """It has been loaded when the model's turn comes, and the error says so; or the container checks as well."""
    container = nn.Sequential(nn.Linear(6, 6), model_of("observed"))
    state = changed(container.state_dict())
    faulty = {**state, f"1.{WEIGHT_SCALE}": -torch.ones(8)}
    before = copy.deepcopy(container[1].state_dict())
    with pytest.raises(RuntimeError, match="for Sequential, of which nothing but what comes before 1 was loaded:"):
        container.load_state_dict(faulty)
    assert_same(container[1].state_dict(), before)
    container.register_load_state_dict_pre_hook(check_state)
    assert_refused(container, faulty, f"1.{WEIGHT_SCALE} must be finite")
    assert_refused(container, {**state, "0.bias": torch.ones(7)}, "size mismatch for 0.bias")
    container.load_state_dict(state)
    assert_same(container.state_dict(), state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", ["observed", "converted"])
def test_copies_check_themselves(kind: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = duplicate(model_of(kind))
    state = changed(model.state_dict())
    assert_refused(model, {**state, "5.bias": torch.ones(3)}, "size mismatch for 5.bias")


@pytest.mark.parametrize("kind", ["observed", "converted"])
@pytest.mark.parametrize("name", ["0", "3"])
def test_a_layer_alone(kind: str, name: str) -> None:
    layer = model_of(kind).get_submodule(name)
    state = changed(layer.state_dict())
    assert_refused(layer, {**state, "bias": torch.ones(3)}, "bias")
    layer.load_state_dict(state)
    assert_same(layer.state_dict(), state)


def test_one_layer_that_is_the_model() -> None:
    prepared = prepare(nn.Linear(6, 2), QATConfig(), (INPUTS,))
    calibrate(prepared, [INPUTS])
    for model in (prepared, convert(prepared)):
        state = changed(model.state_dict())
        last = list(state)[-2]
        assert_refused(model, {**state, last: torch.ones(7)}, last)


class Counted(nn.Linear):
    """Keeps more than tensors, and once had another name for its weight."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.loads = 0

    def get_extra_state(self) -> int:
        return self.loads

    def set_extra_state(self, state: int) -> None:
        self.loads += 1

    def _load_from_state_dict(self, state: State, prefix: str, *args: Any) -> None:
        if f"{prefix}old" in state:
            assert state[f"{prefix}old"].numel()
            state[f"{prefix}weight"] = state.pop(f"{prefix}old") * 2
        super()._load_from_state_dict(state, prefix, *args)


class Renamed(nn.Module):
    """Once had another name for its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input).relu()  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state: State, prefix: str, *args: Any) -> None:
        state["layer.weight"] = state.pop("old.weight")
        super()._load_from_state_dict(state, prefix, *args)


def test_a_model_that_loads_in_a_way_of_its_own() -> None:
    model = prepare(Renamed(), QATConfig(), (INPUTS,))
    state = changed(model.state_dict())
    saved: State = {"old.weight" if key == "layer.weight" else key: value for key, value in state.items()}
    assert_refused(model, {**saved, "layer.bias": torch.ones(3)}, "size mismatch for layer.bias")
    assert_refused(model, {**saved, "old.weight": torch.ones(3)}, "size mismatch for layer.weight")
    model.load_state_dict(saved)
    assert_same(model.state_dict(), state)


@pytest.mark.parametrize("skip", [(), ("0",)])
def test_modules_that_load_in_a_way_of_their_own(skip: tuple[str, ...]) -> None:
    model = prepare(nn.Sequential(Counted(6, 4), nn.Linear(4, 2)), QATConfig(skip=skip), (INPUTS,))
    state: State = {**model.state_dict(), "1.bias": torch.ones(2)}
    if skip:
        state["0.old"] = state.pop("0.weight") / 2
    assert_refused(model, {**state, "1.bias": torch.ones(3)}, "1.bias")
    assert_refused(model, {**state, "0.other": torch.ones(3)}, "0.other")
    assert not model[0].loads
    model.load_state_dict(state)
    assert model[0].loads == (1 if skip else 0)
    assert torch.equal(model[1].bias, torch.ones(2))


def test_hooks_that_rename_keys() -> None:
    def without_model(module: nn.Module, state: State, prefix: str, *args: Any) -> None:
        for key in list(state):
            state[key.replace("model.", "")] = state.pop(key)

    def without_net(module: nn.Module, state: State, prefix: str, *args: Any) -> None:
        for key in list(state):
            state[key.replace("net.", "")] = state.pop(key)

    float_model = network()
    float_model.register_load_state_dict_pre_hook(without_model)
    model = prepare(float_model, QATConfig(), (INPUTS,))
    model.register_load_state_dict_pre_hook(without_net)
    state = {f"model.net.{key}": value for key, value in changed(model.state_dict()).items()}
    assert_refused(model, {**state, "model.net.5.bias": torch.ones(3)}, "5.bias")
    assert_refused(model, {**state, f"model.net.{WEIGHT_SCALE}": torch.zeros(8)}, WEIGHT_SCALE, "positive")
    model.load_state_dict(state)
    assert_same(model.state_dict(), {key.replace("model.net.", ""): value for key, value in state.items()})


def test_a_hook_that_forgives_missing_keys() -> None:
    model = model_of("observed")
    model.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.remove("5.bias"))
    state = changed(model.state_dict())
    before = model[5].bias.clone()
    del state["5.bias"]
    model.load_state_dict(state)
    assert_same(model.state_dict(), {**state, "5.bias": before})


def test_a_batch_normalization_of_an_old_file_lacks_its_count() -> None:
    model = model_of("observed")
    state = changed(model.state_dict())
    del state["1.num_batches_tracked"]
    model.load_state_dict(state)  # without metadata, which PyTorch takes for its oldest format
    assert torch.equal(model[1].running_mean, state["1.running_mean"])


@pytest.mark.parametrize("make", [checkpoint_wrapper, lambda block: nn.Sequential(spectral_norm(block[0]), block[1])])
def test_modules_that_pytorch_puts_around_others(make: Callable[[nn.Module], nn.Module]) -> None:
    float_model = nn.Sequential(make(nn.Sequential(nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 2))
    model = prepare(float_model, QATConfig(), (INPUTS,))
    model(INPUTS)
    state = changed(model.state_dict())
    assert_refused(model, {**state, "1.bias": torch.ones(3)}, "1.bias")
    key = next(key for key in state if key.endswith("weight_fake_quantize.scale"))
    assert_refused(model, {**state, key: -state[key]}, "0.weight_fake_quantize.scale must be finite and positive")
    model.load_state_dict(state)
    assert_same(model.state_dict(), state)


def test_tensors_without_values() -> None:
    model = model_of("observed")
    empty = {key: value.to("meta") for key, value in model.state_dict().items()}
    assert_refused(model, {**empty, "5.bias": torch.ones(3)}, "5.bias")
    other = copy.deepcopy(model).to("meta")
    other.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(other.eval()(INPUTS), model.eval()(INPUTS))


@pytest.mark.parametrize("observer", [MinMaxObserver, HistogramObserver])
def test_an_average_begun_before_any_data_loads(observer: type[ActivationObserver]) -> None:
    """The infinities that stand for no data make NaN in it, which stands for the same."""
    model = prepare(network(), QATConfig(activation_observer=observer), (INPUTS,))
    average = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        average.update_parameters(model)
    state = average.module.state_dict()
    assert any(tensor.isnan().any() for name, tensor in state.items() if name.endswith("extremes"))
    model.load_state_dict(state)
    other = prepare(network(), QATConfig(activation_observer=observer), (INPUTS,))
    other.load_state_dict({**other.state_dict(), **dict(model.named_parameters())})
    for each in (model, other):
        each(INPUTS)
        each.eval()
    with torch.no_grad():
        assert torch.equal(model(INPUTS), other(INPUTS))
