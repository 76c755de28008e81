"""A number in a tensor as Python knows it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mlframework.quantization.qat.host_value import HostValue


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.fill_(5),
        lambda tensor: tensor.detach().copy_(torch.tensor([5.0])),
        lambda tensor: tensor.lerp_(torch.tensor([5.0]), 1.0),
        lambda tensor: torch._foreach_copy_([tensor], [torch.tensor([5.0])]),
    ],
    ids=["fill", "detached", "lerp", "foreach"],
)
def test_a_change_is_seen(change: Callable[[Tensor], object]) -> None:
    tensor = torch.zeros(1)
    value = HostValue(tensor, 0.0)
    change(tensor)
    assert value.read(tensor) == 5


def test_another_tensor_is_read() -> None:
    value = HostValue(torch.zeros(1), 0.0)
    assert value.read(torch.ones(1)) == 1
    with torch.inference_mode():
        assert value.read(torch.full((1,), 3.0)) == 3


def test_what_is_not_seen_is_read_anew() -> None:
    tensor = torch.zeros(1)
    value = HostValue(tensor, 0.0)
    tensor.data.copy_(torch.ones(1))
    assert value.read(tensor) == 0
    assert value.read(tensor, anew=True) == 1


def test_nothing_is_read_of_an_unchanged_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1)
    value = HostValue(tensor, 0.0)
    tensor.fill_(1)
    value.set(tensor, 1.0)
    monkeypatch.setattr(Tensor, "item", None)
    assert value.read(tensor) == 1


def test_a_copy_follows_its_own_tensor() -> None:
    tensor = torch.zeros(1)
    value = HostValue(tensor, 0.0)
    tensor.fill_(1)
    value.set(tensor, 1.0)
    copied_tensor, copied = copy.deepcopy((tensor, value))
    copied_tensor.zero_()  # to the version that the original's is at
    assert copied.read(copied_tensor) == 0
    assert value.read(tensor) == 1


def test_what_has_no_value_keeps_the_last_one() -> None:
    value = HostValue(torch.ones(1), 1.0)
    assert value.read(torch.zeros(1, device="meta")) == 1
    assert torch.vmap(lambda row: torch.zeros(1) + value.read(row))(torch.zeros(2, 1)).tolist() == [[1.0], [1.0]]
