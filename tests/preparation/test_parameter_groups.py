"""Scales get a group of their own: each once, without weight decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from example_architectures import CalledTwice, SmallResNet
from example_models import EXAMPLES, train_briefly
from mlframework.quantization import QATConfig, calibrate, parameter_groups, prepare, quantization_parameters

IMAGES = torch.randn(2, 3, 8, 8)


def prepared_model(learnable: bool = True, target: str = "onnxruntime", model: nn.Module | None = None) -> nn.Module:
    config = QATConfig(target=target, learnable=learnable)
    return prepare(SmallResNet() if model is None else model, config, (IMAGES,))


def ids(parameters: object) -> list[int]:
    return [id(parameter) for parameter in parameters]  # type: ignore[attr-defined]


def test_nothing_is_learned_where_scales_are_observed() -> None:
    prepared = prepared_model(learnable=False)
    assert list(quantization_parameters(prepared)) == []
    (group,) = parameter_groups(prepared, weight_decay=0.1)
    assert ids(group["params"]) == ids(prepared.parameters())
    assert group["weight_decay"] == 0.1


def test_every_parameter_is_in_one_group() -> None:
    prepared = prepared_model()
    own, learned = parameter_groups(prepared, lr=0.1, weight_decay=0.2, momentum=0.9)
    trainable = [parameter for parameter in prepared.parameters() if parameter.requires_grad]
    assert set(ids(trainable)) <= set(ids(own["params"])) | set(ids(learned["params"]))
    assert set(ids(own["params"])).isdisjoint(ids(learned["params"]))
    assert ids(learned["params"]) == ids(quantization_parameters(prepared))
    assert {key: own[key] for key in ("lr", "weight_decay", "momentum")} == {
        "lr": 0.1,
        "weight_decay": 0.2,
        "momentum": 0.9,
    }
    assert (learned["lr"], learned["weight_decay"], learned["momentum"]) == (0.1, 0, 0.9)


def test_a_learning_rate_of_their_own() -> None:
    groups = parameter_groups(prepared_model(), quantization_learning_rate=1e-4, lr=1e-2)
    assert [group["lr"] for group in groups] == [1e-2, 1e-4]


def test_biases_and_normalization_learn_at_a_rate_of_their_own() -> None:
    prepared = prepared_model()
    weights, vectors, learned = parameter_groups(prepared, vector_learning_rate=1e-2, lr=1e-3, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in prepared.named_parameters()}
    assert {names[id(parameter)].rpartition(".")[2] for parameter in weights["params"]} == {"weight"}
    assert {parameter.dim() for parameter in vectors["params"]} == {1}
    assert ids(learned["params"]) == ids(quantization_parameters(prepared))
    assert sorted(ids([*weights["params"], *vectors["params"], *learned["params"]])) == sorted(names)
    assert [(group["lr"], group["weight_decay"]) for group in (weights, vectors)] == [(1e-3, 0.1), (1e-2, 0.1)]


def test_learning_rates_relative_to_what_they_change() -> None:
    prepared = prepared_model()
    with pytest.warns(UserWarning, match=r"no data has set the scales of \S+_fake_quantize and \d+ others"):
        groups = parameter_groups(prepared, relative_quantization_learning_rate=1e-3)
    (unset,) = [group for group in groups if group["params"][0] is prepared.stem.output_fake_quantize.scale]
    assert unset["lr"] == 0
    calibrate(prepared, [torch.randn(4, 3, 8, 8)])
    own, *learned = parameter_groups(prepared, relative_quantization_learning_rate=1e-3, lr=1e-2, weight_decay=0.1)
    assert own["lr"] == 1e-2
    assert [id(*group["params"]) for group in learned] == ids(quantization_parameters(prepared))
    rates = {id(*group["params"]): group["lr"] for group in learned}
    node = prepared.stem.weight_fake_quantize
    assert rates[id(node.scale)] == pytest.approx(1e-3 * node.scale.mean().item())
    node = prepared.stem.output_fake_quantize
    assert rates[id(node.scale)] == pytest.approx(1e-3 * node.scale.mean().item())
    assert rates[id(prepared.x_fake_quantize.zero_point)] == pytest.approx(0.255)  # of the 255 codes above the lowest
    assert {group["weight_decay"] for group in learned} == {0}
    with pytest.raises(ValueError, match=r"must not both be given, got 0\.1 and 0\.2"):
        parameter_groups(prepared, quantization_learning_rate=0.1, relative_quantization_learning_rate=0.2)


@pytest.mark.parametrize(("target", "zero_points"), [("onnxruntime", True), ("tensorrt", False)])
def test_zero_points_are_learned_on_affine_grids_only(target: str, zero_points: bool) -> None:
    prepared = prepared_model(target=target)
    learned = set(ids(quantization_parameters(prepared)))
    assert (id(prepared.x_fake_quantize.zero_point) in learned) is zero_points
    assert id(prepared.stem.weight_fake_quantize.zero_point) not in learned
    assert id(prepared.x_fake_quantize.scale) in learned


def test_what_call_sites_share_is_listed_once() -> None:
    learned = ids(quantization_parameters(prepared_model(model=CalledTwice())))
    assert len(learned) == len(set(learned))


def test_a_frozen_scale_is_left_out() -> None:
    prepared = prepared_model()
    prepared.x_fake_quantize.scale.requires_grad_(False)
    assert id(prepared.x_fake_quantize.scale) not in ids(quantization_parameters(prepared))


def test_listing_parameters_reads_no_value() -> None:
    prepared = prepared_model().to("meta")  # which has none
    count = len(list(quantization_parameters(prepared)))
    assert count > 0
    assert len(parameter_groups(prepared)[1]["params"]) == count


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_moves_scales(optimizer: type[torch.optim.Optimizer]) -> None:
    prepared = prepared_model()
    train_briefly(prepared, (IMAGES,), steps=1)
    before = [parameter.detach().clone() for parameter in quantization_parameters(prepared)]
    step = optimizer(parameter_groups(prepared), lr=1e-2)
    prepared(IMAGES).square().sum().backward()
    step.step()
    moved = [not torch.equal(*pair) for pair in zip(quantization_parameters(prepared), before, strict=True)]
    assert sum(moved) > len(moved) / 2


def test_a_float_model_has_only_its_own() -> None:
    model = EXAMPLES["mlp"].make()
    (group,) = parameter_groups(model, lr=0.1)
    assert ids(group["params"]) == ids(model.parameters())
