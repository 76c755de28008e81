"""Automatic mixed precision."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from example_models import EXAMPLES
from mlframework.quantization import FakeQuantizeLayer, MovingAverageObserver, QATConfig, convert, prepare

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
LEARNABLE = pytest.mark.parametrize("learnable", [False, True])
NETWORKS = pytest.mark.parametrize("name", ["resnet", "transformer"])


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


@pytest.mark.parametrize("learnable", [False, True])
def test_bfloat16_autocast_trains_and_evaluates_on_the_same_integers(learnable: bool) -> None:
    prepared = prepare(_model(), QATConfig(learnable=learnable), (torch.randn(1, 1, 8, 8),))
    optimizer = torch.optim.Adam(prepared.parameters(), lr=0.01)
    inputs = torch.randn(64, 1, 8, 8)
    inputs[32:, :, :, :4] += 2
    labels = torch.arange(64) // 32
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(prepared(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(
        module.scale.dtype is torch.float32 for module in prepared.modules() if isinstance(module, FakeQuantizeLayer)
    )

    converted = convert(prepared)
    prepared.eval()
    with torch.no_grad():
        plain = prepared(inputs)
        assert torch.equal(converted(inputs), plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(prepared(inputs), plain)
            assert torch.equal(converted(inputs), plain)


def quantization_state(model: nn.Module) -> dict[str, Tensor]:
    """Scales, zero points and statistics."""
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizeLayer)
        for key, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def forward(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """The loss, under autocast."""
    with torch.autocast("cpu", dtype):
        return (model(*inputs) - 0.3).square().mean()


@pytest.mark.slow
@NETWORKS
@HALVES
@LEARNABLE
def test_a_gradient_scaler_trains_with_state_in_float32(name: str, dtype: torch.dtype, learnable: bool) -> None:
    inputs = EXAMPLES[name].inputs(8)
    prepared = prepare(EXAMPLES[name].make(), QATConfig(learnable=learnable), inputs)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = forward(prepared, inputs, dtype)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = quantization_state(prepared)
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}
    assert all(parameter.grad is None or parameter.grad.dtype is torch.float32 for parameter in prepared.parameters())
    converted = convert(prepared)
    prepared.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert torch.equal(converted(*inputs), prepared(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True),  # skips by itself
    ],
    ids=["SGD", "AdamW fused"],
)
@LEARNABLE
def test_a_step_that_is_skipped_leaves_what_its_forward_has_shown(
    learnable: bool, make: Callable[..., torch.optim.Optimizer]
) -> None:
    """Neither weights nor learned scales move; statistics have seen the batch, whose values were finite, once."""
    inputs = EXAMPLES["transformer"].inputs(8)
    prepared = prepare(EXAMPLES["transformer"].make(), QATConfig(learnable=learnable), inputs)
    optimizer = make(prepared.parameters())
    for scale, is_skipped in ((2.0**10, False), (2.0**120, True), (2.0**10, False)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer.zero_grad()
        before = quantization_state(prepared)
        loss = forward(prepared, inputs, torch.float16)
        shown = quantization_state(prepared)
        weights = [parameter.detach().clone() for parameter in prepared.parameters()]
        scaler.scale(loss).backward()
        assert is_skipped != all(torch.isfinite(p.grad).all() for p in prepared.parameters() if p.grad is not None)
        scaler.step(optimizer)
        scaler.update()
        after = quantization_state(prepared)
        for key, tensor in shown.items():
            assert torch.isfinite(tensor).all(), key
            if key.endswith("batches") and (not learnable or not before[key]):
                assert tensor == before[key] + 1, key
            if is_skipped or not learnable:
                assert torch.equal(after[key], tensor), key
        unchanged = map(torch.equal, weights, prepared.parameters())
        assert all(unchanged) if is_skipped else not all(unchanged)


@pytest.mark.slow
@LEARNABLE
@pytest.mark.parametrize("overflows_first", [False, True])
def test_a_batch_that_overflows_shows_nothing(overflows_first: bool, learnable: bool) -> None:
    """Products of activations leave float16, the loss is NaN and the step is skipped. What is learned starts from the
    first batch that is finite."""
    inputs = EXAMPLES["transformer"].inputs(8)
    prepared = prepare(EXAMPLES["transformer"].make(), QATConfig(learnable=learnable), inputs)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    bias = prepared.get_submodule("qkv").bias
    own = bias.detach().clone()
    nodes = {name: prepared.get_submodule(f"{name}_fake_quantize") for name in ("matmul", "norm2", "gelu")}
    for overflows in (overflows_first, not overflows_first):
        before = quantization_state(prepared)
        with torch.no_grad():
            bias.copy_(own + 1e4 if overflows else own)
        optimizer.zero_grad()
        loss = forward(prepared, inputs, torch.float16)
        assert torch.isnan(loss) == overflows
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if not overflows:
            own = bias.detach().clone()
        elif not overflows_first:
            after = quantization_state(prepared)
            assert all(torch.equal(after[key], before[key]) for key in after if key.startswith(tuple(nodes)))
    for name, node in nodes.items():
        statistics = node.observer.statistics
        assert node.observer.batches == 1, name
        # But for the step of the optimizer, which changes a learned scale little.
        expected = (statistics.maximum - statistics.minimum) / 255
        torch.testing.assert_close(node.scale.detach(), expected, rtol=0.1 if learnable else 1e-6, atol=0.0, msg=name)
    with torch.no_grad():
        bias.copy_(own)
        assert torch.isfinite(prepared.eval()(*inputs)).all()
        assert torch.equal(convert(prepared)(*inputs), prepared(*inputs))


@LEARNABLE
def test_a_first_batch_of_nan_is_no_data(learnable: bool) -> None:
    """Nor is it counted, where scales are recomputed every so many batches."""
    observer = None if learnable else functools.partial(MovingAverageObserver, update_every=100)
    config = QATConfig(learnable=learnable, activation_observer=observer)
    models = [prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), config, (torch.ones(2, 4),))]
    models.append(copy.deepcopy(models[0]))
    models[0](torch.full((8, 4), torch.nan))
    assert not models[0].get_submodule("input_1_fake_quantize").is_initialized
    batch = torch.randn(8, 4)
    for model in models:
        model(batch)
    states = [model.get_submodule("input_1_fake_quantize").state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
