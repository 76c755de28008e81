"""Training on a GPU: the steps of the CPU, no waiting for the device, mixed precision, compilers, ranks, sizes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from example_steps import assert_gradients_agree
from gpu.moving import moved, on_cpu
from mlframework.quantization import (
    FakeQuantizeLayer,
    QATConfig,
    QuantizationParameters,
    QuantizationScheme,
    calibrate,
    convert,
    fake_quantize,
    preparation_report,
    prepare,
)
from zoo import NETWORKS, Network, ResNet, loss_of
from zoo.data import pictures

Record = Callable[[str, object], None]

SMALL_RESNET = Network(partial(ResNet, [8, 16], [1, 1], 10, True), partial(pictures, image_size=16, classes=10))
SMALL = {"mlp": NETWORKS["mlp"], "resnet": SMALL_RESNET, "gpt": NETWORKS["gpt"]}
EVERY = pytest.mark.parametrize("name", SMALL)
pytestmark = pytest.mark.usefixtures("fresh_compiler")
BATCH, WARM_UP = 32, 3

# Of a loss near 2.3 after a few steps: float32 sums in another order put some values onto other codes.
LOSS_TOLERANCE = 0.02
# The same in half precision.
HALF_LOSS_TOLERANCE = 0.1


@pytest.fixture(autouse=True)
def _float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions round their operands to ten bits by default, and sum in any order."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def prepared_of(name: str, config: QATConfig | None = None, recompute: bool = False) -> nn.Module:
    """On the CPU, in training mode; without dropout, whose draws are each device's own."""
    model = SMALL[name].make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return prepare(model, config, SMALL[name].example_inputs(2), recompute=recompute)


class Steps:
    """Steps of SGD on batches of their own."""

    def __init__(self, model: nn.Module, name: str, device: torch.device, call: nn.Module | None = None) -> None:
        self.model = model.to(device)
        self.call = self.model if call is None else call
        self.name = name
        self.device = device
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.taken = 0

    def batch(self) -> tuple[tuple[Tensor, ...], Tensor]:
        inputs, targets = SMALL[self.name].batch(BATCH, 100 + self.taken)
        self.taken += 1
        return moved(tuple(inputs), self.device), targets.to(self.device)

    def take(self, batch: tuple[tuple[Tensor, ...], Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """One step, which returns its loss and waits for nothing."""
        inputs, targets = batch
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            loss = loss_of(self.call(*inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def losses(self, number: int, dtype: torch.dtype | None = None) -> list[float]:
        return [float(self.take(self.batch(), dtype)) for _ in range(number)]


@contextlib.contextmanager
def without_waiting(device: torch.device) -> Iterator[None]:
    """What makes the host wait for a GPU raises an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled(model: nn.Module, device: torch.device, mode: str | None = None, fullgraph: bool = True) -> Any:
    """By Inductor; in a rehearsal, traced alone."""
    options: dict[str, Any] = {"mode": mode} if device.type == "cuda" else {"backend": "aot_eager"}
    return torch.compile(model, fullgraph=fullgraph, **options)


@EVERY
@pytest.mark.parametrize("learnable", [False, True])
def test_steps_are_those_of_the_cpu(name: str, learnable: bool, device: torch.device, record_property: Record) -> None:
    prepared = prepared_of(name, QATConfig(learnable=learnable))
    on_device = Steps(copy.deepcopy(prepared), name, device).losses(6)
    expected = Steps(prepared, name, torch.device("cpu")).losses(6)
    difference = max(abs(one - other) for one, other in zip(on_device, expected, strict=True))
    record_property("largest difference of a loss", difference)
    assert difference < LOSS_TOLERANCE


@EVERY
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_does_not_wait(name: str, learnable: bool, dtype: torch.dtype | None, device: torch.device) -> None:
    steps = Steps(prepared_of(name, QATConfig(learnable=learnable)), name, device)
    steps.losses(WARM_UP, dtype)
    batch = steps.batch()
    with without_waiting(device):
        loss = steps.take(batch, dtype)
    assert loss.isfinite()


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(name: str, dtype: torch.dtype, device: torch.device, record_property: Record) -> None:
    prepared = prepared_of(name)
    expected = Steps(copy.deepcopy(prepared), name, device).losses(6)
    steps = Steps(prepared, name, device)
    # From where it begins by default, it would take no step before it has found its scale.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=dtype is torch.float16)
    losses = []
    for _ in range(6):
        inputs, targets = steps.batch()
        with torch.autocast(device.type, dtype):
            loss = loss_of(prepared(*inputs), targets)
        scaler.scale(loss).backward()
        scaler.step(steps.optimizer)
        scaler.update()
        steps.optimizer.zero_grad()
        losses.append(float(loss))
    difference = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
    record_property("largest difference of a loss to float32's", difference)
    assert difference < HALF_LOSS_TOLERANCE
    layers = [module for module in prepared.modules() if isinstance(module, FakeQuantizeLayer)]
    assert {layer.scale.dtype for layer in layers} == {torch.float32}
    assert all(layer.scale.isfinite().all() for layer in layers)


@EVERY
def test_prepared_model_compiles_whole(name: str, device: torch.device, record_property: Record) -> None:
    prepared = prepared_of(name)
    steps = Steps(prepared, name, device)
    steps.losses(WARM_UP)  # what is observed alone, and momentum
    other = Steps(copy.deepcopy(prepared), name, device)
    other.taken = steps.taken
    expected = other.losses(3)
    steps.call = compiled(prepared, device)
    steps.optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01, momentum=0.9)
    losses = steps.losses(3)
    assert not counters["graph_break"]
    difference = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
    record_property("largest difference of a loss to eager's", difference)
    assert difference < LOSS_TOLERANCE
    batch = steps.batch()
    with without_waiting(device):
        steps.take(batch)


@EVERY
def test_converted_model_runs_as_graphs_of_the_device(name: str, device: torch.device) -> None:
    network = SMALL[name]
    prepared = prepared_of(name)
    calibrate(prepared, [network.example_inputs(BATCH, seed) for seed in range(2)])
    converted = convert(prepared.eval()).to(device)
    model = compiled(converted, device, "reduce-overhead", fullgraph=False)
    for seed in range(4):
        inputs = moved(tuple(network.example_inputs(BATCH, seed)), device)
        with torch.no_grad():
            expected = converted(*inputs).clone()
            actual = model(*inputs).clone()
        if name == "gpt":  # whose attention is fused, and sums in another order
            assert (actual - expected).abs().max() < 0.1 * expected.abs().max()
        else:
            assert torch.equal(actual, expected)


def test_one_rank_trains_as_without_ranks(device: torch.device, tmp_path: Path) -> None:
    prepared = prepared_of("resnet")
    alone = Steps(copy.deepcopy(prepared), "resnet", device)
    expected = alone.losses(4)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    try:
        model = prepared.to(device)
        steps = Steps(model, "resnet", device, DistributedDataParallel(model))
        losses = steps.losses(4)
    finally:
        dist.destroy_process_group()
    assert losses == pytest.approx(expected, abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("kind", ["training", "evaluation", "converted"])
def test_another_device_than_the_input_is_pytorchs_error(kind: str, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("takes two devices")
    prepared = prepared_of("mlp")
    calibrate(prepared, [SMALL["mlp"].example_inputs(BATCH)])
    model = {"training": prepared.train, "evaluation": prepared.eval, "converted": lambda: convert(prepared)}[kind]()
    with pytest.raises(RuntimeError, match="device"):
        model.to(device)(*SMALL["mlp"].example_inputs(4))
    layer = FakeQuantizeLayer().to(device)
    with pytest.raises(RuntimeError, match="device"):
        layer(torch.randn(7))


@pytest.mark.parametrize("learnable", [False, True])
def test_elements_past_two_to_the_31(learnable: bool, rehearses: bool, device: torch.device) -> None:
    """The first and the last of them, against the same few on the CPU."""
    count, few = (5003 if rehearses else 2**31 + 5003), 2000
    values = torch.empty(count, dtype=torch.bfloat16, device=device).normal_()
    gradient = torch.ones_like(values)
    scheme = QuantizationScheme(symmetric=False)
    scale, zero_point = torch.tensor([0.02], device=device), torch.tensor([3.0], device=device)
    scale.requires_grad_(learnable)
    output = fake_quantize(values.requires_grad_(), QuantizationParameters(scale, zero_point, scheme))
    wanted = (values, scale) if learnable else (values,)
    gradients = torch.autograd.grad(output, wanted, gradient)
    for part in (slice(0, few), slice(count - few, count)):
        own = values.detach()[part].cpu().requires_grad_()
        parameters = QuantizationParameters(scale.detach().cpu(), zero_point.cpu(), scheme)
        expected = fake_quantize(own, parameters)
        assert torch.equal(on_cpu(output.detach()[part]), expected.detach())
        (own_gradient,) = torch.autograd.grad(expected, own, torch.ones_like(own))
        assert torch.equal(on_cpu(gradients[0][part]), own_gradient)
    assert all(each.isfinite().all() for each in gradients[1:])


@pytest.mark.parametrize("name", ["resnet"])
def test_recomputation_gives_the_same_gradients(name: str, device: torch.device) -> None:
    gradients = []
    for recompute in (False, True):
        steps = Steps(prepared_of(name, recompute=recompute), name, device)
        steps.losses(WARM_UP)
        inputs, targets = steps.batch()
        loss_of(steps.model(*inputs), targets).backward()
        gradients.append({name: parameter.grad for name, parameter in steps.model.named_parameters()})
    floor = 3e-6 * max(float(each.abs().max()) for each in gradients[0].values())
    for key, gradient in gradients[0].items():
        assert_gradients_agree(gradients[1][key], gradient, 1e-4, key, floor)  # sums of cuDNN's own order


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_of_scales_are_repeatable(axis: int | None, rehearses: bool, device: torch.device) -> None:
    shape = (3, 5, 4, 4) if rehearses else (32, 256, 56, 56)
    values, gradient = (torch.randn(shape).to(device) for _ in range(2))
    channels = 1 if axis is None else shape[axis]
    scale, zero_point = torch.full((channels,), 0.02, device=device), torch.full((channels,), 3.0, device=device)
    scheme = QuantizationScheme(symmetric=False, channel_axis=axis)
    learned = scale.requires_grad_(), zero_point.requires_grad_()
    runs = [
        torch.autograd.grad(fake_quantize(values, QuantizationParameters(*learned, scheme)), learned, gradient)
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


@EVERY
def test_preparing_on_the_device(name: str, device: torch.device) -> None:
    """The same places, with the same weights."""
    expected = [entry.name for entry in preparation_report(prepared_of(name)).quantized]
    model = SMALL[name].make().to(device)
    prepared = prepare(model, QATConfig(), moved(tuple(SMALL[name].example_inputs(2)), device))
    assert [entry.name for entry in preparation_report(prepared).quantized] == expected
    steps = Steps(prepared, name, device)
    assert all(loss < 10 for loss in steps.losses(2))
