"""Hashes of tensors: equal for equal contents, other for each change, however it was made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import kernels

pytestmark = pytest.mark.usefixtures("_path")

CHANGES: dict[str, Callable[[Tensor], object]] = {
    "sign": lambda tensor: tensor.neg_(),
    "factor": lambda tensor: tensor.mul_(2),
    "first": lambda tensor: tensor.view(-1)[0].add_(1),
    "last bit": lambda tensor: tensor.view(-1)[-1:].copy_(torch.nextafter(tensor.view(-1)[-1:], torch.ones(1) * 99)),
    "two swapped": lambda tensor: tensor.view(-1)[:2].copy_(tensor.view(-1)[:2].flip(0)),
    "reversed": lambda tensor: tensor.copy_(tensor.flip(0, 1)),
    "sign of two": lambda tensor: tensor.view(-1)[:2].neg_(),
}


@pytest.mark.parametrize("shape", [(2, 2), (16, 16), (7, 11), (513, 257)], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_change_shows(change: Callable[[Tensor], object], shape: tuple[int, int]) -> None:
    tensor = nn.Parameter(torch.randn(shape))
    before = kernels.fingerprints([tensor])
    assert kernels.fingerprints([tensor.detach().clone()]) == before
    change(tensor.data)
    assert kernels.fingerprints([tensor]) != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    tensor = torch.randn(33).to(dtype)
    before = kernels.fingerprints([tensor, tensor.clone()])
    assert before[0] == before[1]
    tensor[5] = 3
    assert kernels.fingerprints([tensor]) != before[:1]


def test_a_shape_counts() -> None:
    tensor = torch.zeros(4, 6)
    assert kernels.fingerprints([tensor]) != kernels.fingerprints([tensor.view(6, 4)])


def test_a_transposed_square_is_another() -> None:
    tensor = torch.randn(8, 8)
    assert kernels.fingerprints([tensor]) != kernels.fingerprints([tensor.t()])


@pytest.mark.parametrize("make", [lambda t: t[:, ::2], lambda t: t[:, 3:], lambda t: t[:1].expand(5, 40)])
def test_views_are_read_as_they_lie(make: Callable[[Tensor], Tensor]) -> None:
    base = torch.randn(30, 40)
    view = make(base)
    before = kernels.fingerprints([view])
    view[0, 1].add_(1)
    assert kernels.fingerprints([view]) != before


def test_nothing_and_infinities_have_hashes() -> None:
    assert len(set(kernels.fingerprints([torch.empty(0), torch.tensor([torch.nan]), torch.tensor([torch.inf])]))) == 3


def test_it_does_not_depend_on_the_number_of_threads() -> None:
    tensor = torch.randn(1_000_000)
    threads = torch.get_num_threads()
    one = kernels.fingerprints([tensor])
    torch.set_num_threads(3)
    try:
        assert kernels.fingerprints([tensor]) == one
    finally:
        torch.set_num_threads(threads)
