"""What ``nn.TransformerEncoder`` returns at padded positions: one thing in training, evaluation and a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def compute_padded_positions(model: nn.Module) -> None:
    """Lets the encoders of a model compute at padded positions in evaluation, too, in place.

    With a padding mask, in evaluation and without gradients, PyTorch leaves padded positions out of an encoder's nested
    tensors and returns zeros there. In training it computes them like any others, and so does what ``torch.export``
    makes of the encoder. What is returned at other positions is the same. An encoder without nested tensors still runs
    PyTorch's fused layers.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


@contextmanager
def without_fused_encoders() -> Iterator[None]:
    """PyTorch's encoders compute as in training: their fused operator, which other settings than the mode switch on and
    off, rounds differently."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
