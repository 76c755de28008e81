"""Which grids a configuration means, and which layers it means them for."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import nn

from mlframework.quantization import MinMaxObserver, PercentileObserver, QATConfig, StraightThroughEstimator

LINEAR, CONV = nn.Linear(4, 2), nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize(
    ("target", "activation", "non_negative"),
    [
        ("onnxruntime", "uint8 [0, 255] affine, per tensor", "uint8 [0, 255] symmetric, per tensor"),
        ("openvino", "int8 [-128, 127] symmetric, per tensor", "uint8 [0, 255] symmetric, per tensor"),
        ("tensorrt", "int8 [-128, 127] symmetric, per tensor", "int8 [-128, 127] symmetric, per tensor"),
        ("executorch", "int8 [-128, 127] affine, per tensor", "int8 [-128, 127] affine, per tensor"),
    ],
)
def test_grids_of_a_target(target: str, activation: str, non_negative: str) -> None:
    config = QATConfig.for_target(target)
    assert str(config.activation_scheme) == activation
    assert str(config.non_negative_activation_scheme) == non_negative
    assert str(config.weight_scheme) == "int8 [-127, 127] symmetric, per channel 0"


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "executorch"])
def test_zero_after_a_relu_is_the_lowest_code(target: str) -> None:
    """What fusing the ReLU into the layer takes; on an affine grid the observer brings it about."""
    scheme = QATConfig(target=target).non_negative_activation_scheme
    assert not scheme.symmetric or scheme.symmetric_zero_point == scheme.quant_min


def test_onnxruntime_is_the_default() -> None:
    assert QATConfig() == QATConfig.for_target("onnxruntime")


@pytest.mark.parametrize(("bits", "lowest", "highest"), [(2, -1, 1), (4, -7, 7), (7, -63, 63)])
def test_weights_of_fewer_bits(bits: int, lowest: int, highest: int) -> None:
    config = QATConfig(weight_bits=bits)
    assert (config.weight_scheme.quant_min, config.weight_scheme.quant_max) == (lowest, highest)
    assert config.activation_scheme.bits == 8


@pytest.mark.parametrize(("bits", "highest"), [(8, 63), (7, 63), (4, 7)])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt", "executorch"])
def test_a_reduced_range_keeps_sums_of_two_products_within_sixteen_bits(target: str, bits: int, highest: int) -> None:
    config = QATConfig.for_target(target, weight_bits=bits, reduce_range=True)
    weight = config.weight_scheme
    assert (weight.quant_min, weight.quant_max) == (-highest, highest)
    assert 2 * 255 * weight.quant_max <= torch.iinfo(torch.int16).max
    plain = QATConfig.for_target(target, weight_bits=bits)
    assert config.activation_scheme == plain.activation_scheme
    assert config.non_negative_activation_scheme == plain.non_negative_activation_scheme


def test_a_reduced_range_is_each_layers_own() -> None:
    config = QATConfig(reduce_range=True, overrides={"full": QATConfig()})
    bits = {}
    for name in ("full", "other"):
        layer = config.for_layer(name, LINEAR)
        assert layer is not None
        bits[name] = layer.weight_scheme.bits
    assert bits == {"full": 8, "other": 7}


def test_activations_of_fewer_bits() -> None:
    config = QATConfig.for_target("executorch", activation_bits=4)
    assert (config.activation_scheme.quant_min, config.activation_scheme.quant_max) == (-8, 7)
    assert config.non_negative_activation_scheme.bits == 4
    assert config.weight_scheme.bits == 8


def test_for_target_takes_every_field() -> None:
    estimator = StraightThroughEstimator(saturated="identity")
    config = QATConfig.for_target("tensorrt", learnable=True, estimator=estimator, skip=("a",))
    assert (config.learnable, config.estimator, config.skip) == (True, estimator, ("a",))


@pytest.mark.parametrize("selector", ["stem.0", "stem.*", "s*0", nn.Linear, nn.Module], ids=str)
def test_selectors_pick_by_name_pattern_and_type(selector: str | type[nn.Module]) -> None:
    other = QATConfig(weight_bits=4)
    config = QATConfig(overrides={selector: other})
    assert config.for_layer("stem.0", LINEAR) is other
    assert QATConfig(skip=(selector,)).for_layer("stem.0", LINEAR) is None


@pytest.mark.parametrize("selector", ["stem", "0", "STEM.0", "stem.0.*", nn.Conv2d], ids=str)
def test_selectors_leave_others_alone(selector: str | type[nn.Module]) -> None:
    config = QATConfig(overrides={selector: QATConfig(weight_bits=4)}, skip=(selector,))
    assert config.for_layer("stem.0", LINEAR) is config


def test_the_first_override_that_matches_counts() -> None:
    first, second = QATConfig(weight_bits=4), QATConfig(weight_bits=5)
    config = QATConfig(overrides={"a*": first, nn.Linear: second})
    assert config.for_layer("ab", LINEAR) is first
    assert config.for_layer("b", LINEAR) is second


def test_skip_goes_before_overrides() -> None:
    config = QATConfig(overrides={"a": QATConfig()}, skip=(nn.Linear,))
    assert config.for_layer("a", LINEAR) is None


def test_selectors_that_match_nothing_are_told() -> None:
    config = QATConfig(overrides={"a": QATConfig(), nn.Conv1d: QATConfig()}, skip=("b.*", nn.Conv2d))
    assert config.unused_selectors({"a": LINEAR, "c": CONV}) == [nn.Conv1d, "b.*"]


@pytest.mark.parametrize("make", [MinMaxObserver, functools.partial(PercentileObserver, 99.0)])
def test_observers_come_from_any_maker(make: Any) -> None:
    config = QATConfig(activation_observer=make)
    assert config.activation_observer() is not config.activation_observer()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target": "tflite"}, ValueError, "target must be one of executorch, litert, onnxruntime, openvino, tensorrt"),
        ({"weight_bits": 1}, ValueError, "weight_bits must be an int between 2 and 8, got 1"),
        ({"activation_bits": 16}, ValueError, "activation_bits"),
        ({"activation_bits": 8.0}, ValueError, "activation_bits"),
        ({"weight_bits": True}, ValueError, "weight_bits"),
        ({"activation_observer": MinMaxObserver()}, TypeError, "activation_observer must make a new observer"),
        ({"activation_observer": "minmax"}, TypeError, "activation_observer"),
        ({"estimator": "ste"}, TypeError, "estimator must be a StraightThroughEstimator"),
        ({"target": ["onnxruntime"]}, TypeError, r"target must be a str, got \['onnxruntime'\]"),
        ({"reduce_range": 1}, TypeError, "reduce_range must be a bool, got 1"),
        ({"per_channel_weights": 1}, TypeError, "per_channel_weights must be a bool, got 1"),
        ({"learnable": 1}, TypeError, "learnable must be a bool, got 1"),
        ({"quantize_last_linear": "no"}, TypeError, "quantize_last_linear must be a bool, got 'no'"),
        ({"overrides": None}, TypeError, "overrides must be a mapping .*, got None"),
        ({"overrides": ["head"]}, TypeError, "overrides must be a mapping"),
        ({"skip": None}, TypeError, "skip must be a tuple .*, got None"),
        ({"skip": "head"}, TypeError, "skip must be a tuple"),
        ({"skip": nn.Linear}, TypeError, "skip must be a tuple"),
        ({"skip": (3,)}, TypeError, "must select by name, pattern or module type, got 3"),
        ({"skip": (int,)}, TypeError, "must select by"),
        ({"overrides": {LINEAR: QATConfig()}}, TypeError, "must select by"),
        ({"overrides": {"head": {"weight_bits": 4}}}, TypeError, r"overrides\['head'\] must be a QATConfig, got dict"),
    ],
    ids=str,
)
def test_bad_fields_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QATConfig(**fields)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="bits"):
        QATConfig.for_target("onnxruntime", bits=4)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QATConfig().weight_bits = 4  # type: ignore[misc]


def test_it_has_a_hash() -> None:
    ones, others = (QATConfig(overrides={"a": QATConfig(weight_bits=bits)}, skip=["b"]) for bits in (4, 5))  # type: ignore[arg-type]
    assert ones.skip == ("b",)
    assert hash(ones) == hash(copy.deepcopy(ones))
    assert len({ones, copy.deepcopy(ones), others}) == 2


def test_an_override_for_another_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"overrides\['0'\] must be for target 'onnxruntime', got 'tensorrt'"):
        QATConfig(overrides={"0": QATConfig.for_target("tensorrt")})
