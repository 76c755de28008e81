"""Bits of masks: in the order in which the elements of a tensor lie in memory."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlframework.quantization.kernels.operators.masks import pack_mask, unpack_mask


@given(shape=st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple), turned=st.booleans())
def test_a_packed_mask_unpacks(shape: tuple[int, ...], turned: bool) -> None:
    flags = torch.rand(shape) < 0.5
    if turned:
        flags = flags.transpose(0, -1).contiguous().transpose(0, -1)
    mask = pack_mask(flags)
    assert mask.shape == (math.ceil(flags.numel() / 8),)
    assert torch.equal(unpack_mask(mask, flags.shape, flags.stride()), flags)


def test_bits_lie_as_elements_do() -> None:
    flags = (torch.rand(3, 4, 5) < 0.5).transpose(0, 2)
    assert not flags.is_contiguous()
    lying = flags.transpose(0, 2).flatten()
    assert pack_mask(flags).tolist() == np.packbits(lying.numpy(), bitorder="little").tolist()
