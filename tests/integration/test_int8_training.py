"""Training on integer codes as users do it: memory, checkpoints, accumulation, copies, optimizers, long runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from example_steps import assert_gradients_agree, count_operators, needs_integer_layers, reference_step, step_of
from mlframework.quantization import QATConfig, QATModuleWrapper, convert, kernels, prepare
from mlframework.quantization.qat.fake_quantize_layer import FakeQuantizeLayer
from zoo import MLP, NETWORKS, Network, loss_of, train_steps

pytestmark = [needs_integer_layers, pytest.mark.slow]  # trains networks of the zoo

BATCH = 8


def trained(network: Network, steps: int = 2, **options: Any) -> nn.Module:
    prepared = prepare(network.make(), QATConfig(), network.example_inputs(2), **options)
    train_steps(prepared, network, steps, batch_size=BATCH)
    prepared.zero_grad()
    return prepared


def relu_chain() -> nn.Module:
    return MLP(3 * 16 * 16, hidden=(256, 256, 256), batch_norm=False)


# What is kept for backward


def saved_bytes(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, list[Tensor]]:
    """Bytes of the storages that a forward keeps for backward, without those of the model."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total, list(kept.values())


@pytest.mark.parametrize(
    ("make", "recompute", "most"),
    [
        (NETWORKS["resnet20"].make, False, 0.75),
        (NETWORKS["resnet20"].make, True, 0.35),
        (NETWORKS["mobilenet_v2"].make, False, 0.75),
        (NETWORKS["mobilenet_v2"].make, True, 0.35),
        (relu_chain, False, 0.40),
        (NETWORKS["mlp"].make, False, 0.40),
        (NETWORKS["mlp"].make, True, 0.40),
    ],
    ids=["resnet", "resnet recomputing", "mobilenet", "mobilenet recomputing", "relu chain", "mlp", "mlp recomputing"],
)
def test_backward_takes_less_memory_than_float(make: Callable[[], nn.Module], recompute: bool, most: float) -> None:
    # A batch that outweighs what is kept of weights: their packed codes and masks.
    inputs = (torch.randn(64, 3, 16, 16),)
    in_float, _ = saved_bytes(make().train(), inputs)
    prepared = prepare(make(), QATConfig(), inputs, recompute=recompute)
    for _ in range(2):
        prepared(*inputs)
    in_integers, kept = saved_bytes(prepared, inputs)
    assert in_integers <= most * in_float, f"{in_integers / in_float:.3f}"
    assert any(tensor.dtype is torch.uint8 for tensor in kept)


# Recomputing


# mobilenet_v2 has what resnet20 has, and depthwise convolutions.
@pytest.mark.parametrize("name", [pytest.param("resnet20", marks=pytest.mark.long), "mobilenet_v2", "unet", "mlp"])
def test_recomputing_trains_bit_for_bit_the_same(name: str) -> None:
    runs = []
    for recompute in (False, True):
        network = NETWORKS[name]
        prepared = prepare(network.make(), QATConfig(), network.example_inputs(2), recompute=recompute)
        losses = train_steps(prepared, network, 5, batch_size=BATCH)
        gradients = [parameter.grad for parameter in prepared.parameters()]
        runs.append((losses, gradients, list(prepared.state_dict().values())))
    assert runs[0][0] == runs[1][0]
    for one, other in zip(runs[0][1] + runs[0][2], runs[1][1] + runs[1][2], strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


# Against the user's own modules


class NetworkStep(NamedTuple):
    """One forward and backward: the loss, all gradients as one vector, the buffers."""

    loss: float
    gradients: Tensor
    buffers: dict[str, Tensor]


def network_step(model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> NetworkStep:
    model = copy.deepcopy(model)
    loss = loss_of(model(*inputs), targets)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    vector = torch.cat([gradient.flatten().double() for gradient in gradients if gradient is not None])
    return NetworkStep(loss.item(), vector, dict(model.named_buffers()))


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "unet", "mlp", "gpt", "vit"])
def test_a_network_is_as_close_to_float64_as_its_modules_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that differ by float32 rounding round to another code now and then, which every layer after it amplifies: in
    a deep network, two orders of summation lie some hundredths apart in their gradients. On codes sums are exact."""
    network = NETWORKS[name]
    prepared = trained(network)
    for module in prepared.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs, targets = network.batch(BATCH, seed=5)
    calls = count_operators(monkeypatch, "train_layer")
    on_codes = network_step(prepared, inputs, targets)
    wrappers = [module for module in prepared.modules() if isinstance(module, QATModuleWrapper)]
    assert calls["train_layer"] == sum(isinstance(wrapper.layer, (nn.Linear, nn.Conv2d)) for wrapper in wrappers)
    with kernels.reference_kernels():
        on_values = network_step(prepared, inputs, targets)
        in_float64 = tuple(value.double() if value.is_floating_point() else value for value in inputs)
        exact = network_step(copy.deepcopy(prepared).double(), in_float64, targets)

    def error(step: NetworkStep) -> float:
        return float((step.gradients - exact.gradients).norm() / exact.gradients.norm())

    assert error(on_codes) <= 2 * error(on_values) + 1e-5, f"{error(on_codes):.1e}, {error(on_values):.1e}"
    assert on_codes.loss == pytest.approx(exact.loss, rel=5e-3)
    for key, buffer in on_codes.buffers.items():
        expected = exact.buffers[key].to(buffer.dtype)
        torch.testing.assert_close(buffer, expected, rtol=2e-3, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


# What lies between a node and a layer


@pytest.mark.parametrize("how", ["module", "function", "feature"])
def test_active_dropout_takes_values_off_the_grid(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)
            self.dropout = nn.Dropout2d(0.3) if how == "feature" else nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.first(x))
            dropped = F.dropout(hidden, 0.3, self.training) if how == "function" else self.dropout(hidden)
            result: Tensor = self.last(dropped)
            return result

    # Dropout draws in the order in which elements lie, which is the input's for the layer and channels-last on codes.
    inputs = torch.randn(4, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    prepared = prepare(Dropping(), QATConfig(), (inputs,))
    for _ in range(2):
        prepared(inputs)
    dropouts = [module for module in prepared.modules() if isinstance(module, (nn.Dropout, nn.Dropout2d))]
    active = dropouts[-1]
    calls = count_operators(monkeypatch, "train_layer")

    def steps() -> tuple[Any, Any]:
        torch.manual_seed(3)
        one = step_of(prepared, inputs)
        torch.manual_seed(3)
        return one, reference_step(prepared, inputs)

    on_codes, expected = steps()
    assert calls["train_layer"] == 1, "the first layer alone"
    step = float(prepared.get_submodule("last").output_fake_quantize.scale)
    assert (on_codes.output - expected.output).abs().max() <= 1.01 * step
    for key, gradient in on_codes.gradients.items():
        assert_gradients_agree(gradient, expected.gradients[key], rtol=1e-3, name=key)

    for change in (lambda: setattr(active, "p", 0.0), active.eval):
        active.train()
        active.p = 0.3
        change()
        calls.clear()
        prepared(inputs)
        assert calls["train_layer"] == 2, "a dropout that is off leaves values on their grid"


# Ways to train


def _loss(model: nn.Module, network: Network, seed: int) -> Tensor:
    inputs, targets = network.batch(BATCH, seed=seed)
    return loss_of(model(*inputs), targets)


def test_gradients_accumulate() -> None:
    """Scales move with the second forward; what the first kept for backward does not."""
    network = NETWORKS["resnet20"]
    prepared = trained(network)
    in_turn = copy.deepcopy(prepared)
    one, other = _loss(prepared, network, 11), _loss(prepared, network, 12)
    one.backward()
    alone = [parameter.grad.clone() for parameter in prepared.parameters()]
    other.backward()
    both = [parameter.grad.clone() for parameter in prepared.parameters()]

    for seed, gradients in ((11, alone), (12, both)):
        _loss(in_turn, network, seed).backward()
        assert all(map(torch.equal, gradients, (parameter.grad for parameter in in_turn.parameters())))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_checkpointing(use_reentrant: bool, recompute: bool) -> None:
    network = NETWORKS["resnet20"]
    prepared = trained(network, recompute=recompute)
    for module in prepared.modules():
        if isinstance(module, FakeQuantizeLayer):
            module.observer.enabled = False  # a recomputed forward would quantize with what the first has shown
    plain = copy.deepcopy(prepared)
    inputs, targets = network.batch(BATCH, seed=5)
    expected = loss_of(plain(*inputs), targets)
    expected.backward()
    inputs[0].requires_grad_()
    loss = loss_of(checkpoint(prepared, *inputs, use_reentrant=use_reentrant), targets)
    loss.backward()
    assert torch.equal(loss, expected)
    for parameter, other in zip(prepared.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_while_observers_move(use_reentrant: bool) -> None:
    network = NETWORKS["mlp"]
    prepared = trained(network, steps=30)
    plain = copy.deepcopy(prepared)
    inputs, targets = network.batch(BATCH, seed=5)
    loss_of(plain(*inputs), targets).backward()
    inputs[0].requires_grad_()
    loss_of(checkpoint(prepared, *inputs, use_reentrant=use_reentrant), targets).backward()
    for (name, parameter), other in zip(prepared.named_parameters(), plain.parameters(), strict=True):
        # The second forward has a grid that one batch has moved by a hundredth of its difference.
        if not (name.endswith("bias") and other.grad.norm() < 1e-5):
            assert (parameter.grad - other.grad).norm() <= 0.2 * other.grad.norm(), name


def test_autocast_trains_close_to_float32() -> None:
    network = NETWORKS["resnet20"]
    prepared = trained(network)
    plain = copy.deepcopy(prepared)
    expected = _loss(plain, network, 5)
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(prepared, network, 5)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for (name, parameter), other in zip(prepared.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad.dtype is torch.float32
        # Each layer's gradients lose all but eight bits; twenty layers add up to some hundredths.
        assert (parameter.grad - other.grad).norm() <= 0.1 * other.grad.norm(), name


@pytest.mark.parametrize("name", ["resnet20", "gpt"])
def test_copies_go_on_training_alike(name: str) -> None:
    network = NETWORKS[name]
    prepared = trained(network, recompute=True)
    copies = [copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))]
    expected = train_steps(prepared, network, 3, seed=1, batch_size=BATCH)
    for other in copies:
        assert train_steps(other, network, 3, seed=1, batch_size=BATCH) == expected
        assert all(map(torch.equal, other.state_dict().values(), prepared.state_dict().values()))


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True),
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    ],
    ids=["SGD fused", "AdamW fused", "SGD"],
)
def test_optimizers_change_the_weights_that_the_next_step_uses(make: Any) -> None:
    network = NETWORKS["mlp"]
    losses = []
    for reference in (False, True):
        prepared = prepare(network.make(), QATConfig(), network.example_inputs(2))
        optimizer = make(prepared.parameters())
        run = []
        with kernels.reference_kernels() if reference else torch.enable_grad():
            for step in range(10):
                optimizer.zero_grad()
                loss = _loss(prepared, network, step % 3)
                loss.backward()
                optimizer.step()
                run.append(loss.item())
        losses.append(run)
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_nan_reaches_the_loss_of_a_network() -> None:
    for name in ("resnet20", "mlp", "vit"):
        network = NETWORKS[name]
        for where in ("input", "weight"):
            prepared = trained(network)
            inputs, targets = network.batch(BATCH, seed=5)
            with torch.no_grad():
                tensor = inputs[0] if where == "input" else next(prepared.parameters())
                tensor.view(-1)[0] = torch.nan
            assert loss_of(prepared(*inputs), targets).isnan(), (name, where)


def test_what_is_trained_is_what_is_deployed() -> None:
    """Without an output node after it, the last layer gives in training what its integer layer gives of the same."""
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5))
    prepared = prepare(model, QATConfig(), (torch.randn(2, 24),))
    for _ in range(3):
        prepared(torch.randn(64, 24))
    for module in prepared.modules():
        if isinstance(module, FakeQuantizeLayer):
            module.observer.enabled = False
    inputs = torch.randn(64, 24)
    in_training = prepared(inputs)
    converted = convert(prepared)
    with torch.no_grad():
        # Layers between nodes round a float product where integers round once: one code in a thousand may differ.
        deployed = converted(inputs)
    same = (deployed - in_training).abs().amax(1) <= 1e-6
    assert same.double().mean() >= 0.9


# Long runs


@pytest.mark.parametrize(
    ("name", "steps", "tolerance"),
    [
        ("mlp", 40, 1e-3),
        pytest.param("gpt", 100, 1e-3, marks=pytest.mark.long),
        pytest.param("resnet20", 5, 2e-2, marks=pytest.mark.long),
    ],
)
def test_two_hundred_steps_end_alike(name: str, steps: int, tolerance: float) -> None:
    """A code that rounds the other way changes what follows, so runs part as two machines' would, and learn the same.

    Until they part (at once, in a deep network), the losses agree to the tolerance; afterwards, their averages do.
    """
    network = NETWORKS[name]
    runs = []
    for reference in (False, True):
        prepared = prepare(network.make(), QATConfig(), network.example_inputs(2))
        with kernels.reference_kernels() if reference else torch.enable_grad():
            runs.append(torch.tensor(train_steps(prepared, network, 200, learning_rate=3e-4)))
    on_codes, expected = runs
    assert ((on_codes - expected).abs() <= tolerance * expected)[:steps].all()
    assert float(on_codes[-50:].mean()) == pytest.approx(float(expected[-50:].mean()), rel=0.02)
