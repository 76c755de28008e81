"""Accelerate trains a prepared model like any other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from example_models import small_cnn
from mlframework.quantization import QATConfig, convert, parameter_groups, prepare

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_what_accelerate_trains_converts_to_what_it_evaluates(mixed_precision: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    images, labels = torch.randn(32, 3, 8, 8), torch.randint(0, 3, (32,))
    prepared = prepare(small_cnn(), QATConfig(learnable=True), (images[:1],))
    optimizer = torch.optim.AdamW(parameter_groups(prepared, quantization_learning_rate=1e-3), lr=1e-2)
    batches = DataLoader(TensorDataset(images, labels), batch_size=8)
    model, optimizer, batches = accelerator.prepare(prepared, optimizer, batches)
    losses = []
    for _ in range(3):
        for inputs, targets in batches:
            loss = F.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    unwrapped = accelerator.unwrap_model(model).eval()
    with torch.no_grad():
        assert torch.equal(convert(unwrapped)(images), unwrapped(images))
    AcceleratorState._reset_state(reset_partial_state=True)
