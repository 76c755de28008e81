"""What is noted of a network tells it from others, and stays with what is made of it."""

from __future__ import annotations

import copy
import json

import torch
from torch import nn

from mlframework.quantization import QATConfig, calibrate, convert, prepare
from mlframework.quantization.graph.float_structure import FLOAT_NAME, FLOAT_STRUCTURE, float_structure


def network(padding: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))


def test_a_record_has_shapes_and_settings_and_goes_through_json() -> None:
    structure = float_structure(network())
    assert list(structure) == ["", "0", "1", "2", "3"]
    assert structure["0"]["class"] == "torch.nn.modules.conv.Conv2d"
    assert structure["0"]["tensors"] == {"weight": [4, 3, 3, 3], "bias": [4]}
    assert structure["1"]["tensors"]["running_mean"] == [4]
    assert structure["3"]["settings"]["kernel_size"] == 2
    assert json.loads(json.dumps(structure)) == structure
    assert structure == float_structure(network())
    assert structure != float_structure(network(padding=0))


def test_it_stays_with_copies_and_with_what_is_converted() -> None:
    images = torch.randn(2, 3, 8, 8)
    model = network()
    prepared = prepare(model, QATConfig(), (images,))
    calibrate(prepared, [images])
    for made in (prepared, copy.deepcopy(prepared), convert(prepared)):
        assert vars(made)[FLOAT_STRUCTURE] == float_structure(network())
    assert vars(convert(prepared)[3])[FLOAT_NAME] == "3"  # type: ignore[index]
    assert not any(FLOAT_NAME in vars(module) for module in model.modules())
    single = prepare(nn.Linear(3, 2), QATConfig(), (torch.randn(2, 3),))
    calibrate(single, [torch.randn(2, 3)])
    assert list(vars(convert(single))[FLOAT_STRUCTURE]) == [""]
