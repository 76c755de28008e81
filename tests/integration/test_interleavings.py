"""Whatever a user does to a prepared model, in whatever order: no exception but the documented ones, no NaN, scales
positive, zero points on their grids, and evaluation as converted, bit for bit."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mlframework.quantization import FakeQuantizeLayer, MinMaxObserver, QATConfig, QATSchedule, convert, prepare

pytestmark = [
    pytest.mark.slow,
    # Documented: what no data has reached evaluates, and is converted, in float.
    pytest.mark.filterwarnings("ignore:.*has seen no data"),
]

CLASSES = 3
WHICH_NODES = st.none() | st.integers(0, 30)  # all, or one of them
BATCH_NORM_STATE = ("running_mean", "running_var", "num_batches_tracked")


class Image(nn.Module):
    """A residual block, a depthwise convolution, a pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ReLU6())
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.depthwise(x))
        return self.head(F.adaptive_avg_pool2d(x, 2).mean((2, 3)))


class Text(nn.Module):
    """An embedding and two linear layers, with a table of an activation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.gelu(self.hidden(self.embedding(tokens))).mean(1))


class Variant(NamedTuple):
    make: Callable[[], nn.Module]
    config: QATConfig


VARIANTS = {
    "observed": Variant(Image, QATConfig()),
    "learned": Variant(Image, QATConfig(learnable=True)),
    "text": Variant(Text, QATConfig(weight_bits=4, activation_observer=MinMaxObserver)),
    "signed grids": Variant(Image, QATConfig.for_target("tensorrt", activation_bits=4)),
}


def batch_of(variant: str, size: int, generator: torch.Generator | None = None) -> Tensor:
    if VARIANTS[variant].make is Text:
        return torch.randint(7, (size, 3), generator=generator)
    return torch.randn(size, 2, 4, 4, generator=generator)


@cache
def _prepared(variant: str, has_data: bool) -> nn.Module:
    torch.manual_seed(0)
    model = prepare(VARIANTS[variant].make(), VARIANTS[variant].config, (batch_of(variant, 2),))
    if has_data:
        model(batch_of(variant, 8))
    return model


def nodes_of(model: nn.Module) -> list[FakeQuantizeLayer]:
    return [module for module in model.modules() if isinstance(module, FakeQuantizeLayer)]


def has_data(node: FakeQuantizeLayer) -> bool:
    return bool(node.initialized >= 0.5)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(0.125), other.nan_to_num(0.125))


class Interleavings(RuleBasedStateMachine):
    """A prepared model, and perhaps what was saved of it, its average, and what it was last converted to."""

    @initialize(variant=st.sampled_from(sorted(VARIANTS)), has_data=st.sampled_from([True, True, True, False]))
    def begin(self, variant: str, has_data: bool) -> None:
        self.variant = variant
        self.generator = torch.Generator().manual_seed(0)
        self.model = copy.deepcopy(_prepared(variant, has_data))
        self.dtype = torch.float32
        self.memory_format = torch.contiguous_format
        self.saved: dict[str, Tensor] | None = None
        self.average: AveragedModel | None = None
        self.converted: nn.Module | None = None  # of the model as it is
        self.probe = self._batch(3)

    # --- training -------------------------------------------------------------------------------------------------

    @rule(size=st.sampled_from([4, 4, 4, 1]), learning_rate=st.sampled_from([0.05, 0.05, 1.0]))
    def step(self, size: int, learning_rate: float) -> None:
        self._step(self._batch(size), learning_rate)

    @rule()
    def empty_batch(self) -> None:
        """Nothing is seen of it: neither the scales of activations nor their observers change."""
        nodes = [node for node in nodes_of(self.model) if node.reduces_over_ranks]
        before = [state_of(node) for node in nodes]
        self._step(self._batch(0), 0.05)
        for node, state in zip(nodes, before, strict=True):
            assert all(same(tensor, state[name]) for name, tensor in node.state_dict().items()), node.name

    @precondition(lambda self: self._takes_floats)
    @rule(in_training=st.booleans())
    def nan_batch(self, in_training: bool) -> None:
        """As under a GradScaler: the loss shows it, and the step is not taken. Batch normalization, as PyTorch's does,
        takes its statistics over; they are put back, as from a checkpoint."""
        batch = self._batch(4)
        batch[1] = torch.nan
        if not in_training:
            self._evaluate(batch)
            return
        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        before = [{name: getattr(norm, name).clone() for name in BATCH_NORM_STATE} for norm in norms]
        self.converted = None
        if self._refusal_of_step() is None:
            self.model.train()
            loss = self._loss(batch)
            assert loss.isnan()
            loss.backward()
            self.model.zero_grad()
            if self._refusal() is None and not norms[0].running_mean.isfinite().all():
                with pytest.raises(ValueError, match=r"running_mean of the .* holds NaN|must compute in float32"):
                    convert(self.model)
        for norm, state in zip(norms, before, strict=True):
            for name, tensor in state.items():
                getattr(norm, name).copy_(tensor)

    # --- switches -------------------------------------------------------------------------------------------------

    @rule(on=st.booleans(), which=WHICH_NODES)
    def switch_observers(self, on: bool, which: int | None) -> None:
        for node in self._some(which):
            node.observer.enabled = on
        self.converted = None

    @rule(on=st.booleans(), which=WHICH_NODES)
    def switch_fake_quantize(self, on: bool, which: int | None) -> None:
        for node in self._some(which):
            node.fake_quantize_enabled = on
        self.converted = None

    @rule()
    def switch_everything_on(self) -> None:
        for node in nodes_of(self.model):
            node.fake_quantize_enabled = node.observer.enabled = True
        self.converted = None

    @rule(batch_norm=st.booleans())
    def freeze(self, batch_norm: bool) -> None:
        QATSchedule(self.model, observe_until=1, freeze_batch_norm_from=1 if batch_norm else None).step()
        self.converted = None

    # --- copies, states, moves ------------------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        self.saved = state_of(self.model)

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        self.model.load_state_dict(self.saved)
        self.converted = None

    @rule(by_pickle=st.booleans())
    def copy_model(self, by_pickle: bool) -> None:
        """The copy goes on in the place of the model."""
        other = pickle.loads(pickle.dumps(self.model)) if by_pickle else copy.deepcopy(self.model)
        assert same(self._output(other), self._output(self.model))
        self.model = other

    @precondition(lambda self: self.converted is not None)
    @rule(by_pickle=st.booleans())
    def copy_converted(self, by_pickle: bool) -> None:
        self.converted = pickle.loads(pickle.dumps(self.converted)) if by_pickle else copy.deepcopy(self.converted)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def move_to_dtype(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.dtype = dtype
        self.probe = self.probe.to(dtype) if self._takes_floats else self.probe
        self.average = self.converted = None  # an average is of tensors of one dtype

    @precondition(lambda self: self._takes_floats)
    @rule(memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]), moves_model=st.booleans())
    def change_layout(self, memory_format: torch.memory_format, moves_model: bool) -> None:
        self.memory_format = memory_format
        self.probe = self.probe.contiguous(memory_format=memory_format)
        if moves_model:
            self.model.to(memory_format=memory_format)

    @rule(
        which=st.integers(0, 30),
        what=st.sampled_from(["scaled", "replaced", "a channel of zeros", "all zeros", "an outlier", "negated"]),
    )
    def write_data(self, which: int, what: str) -> None:
        """To a weight, a bias or a gamma, where PyTorch counts no change."""
        parameters = [p for name, p in self.model.named_parameters() if not name.endswith(("scale", "zero_point"))]
        data = parameters[which % len(parameters)].data
        if what == "scaled":
            data.mul_(1.5)
        elif what == "replaced":
            parameters[which % len(parameters)].data = data.flip(0) + 0.01
        elif what == "a channel of zeros":
            data[0] = 0
        elif what == "all zeros":
            data.zero_()
        elif what == "an outlier":
            data[(-1,) * data.dim()] = 1e4
        else:
            data.neg_()
        self.converted = None

    # --- averages -------------------------------------------------------------------------------------------------

    @rule(decay=st.sampled_from([0.5, 0.999, None]))
    def start_average(self, decay: float | None) -> None:
        average = None if decay is None else get_ema_multi_avg_fn(decay)
        self.average = AveragedModel(self.model, use_buffers=True, multi_avg_fn=average)

    @precondition(lambda self: self.average is not None)
    @rule()
    def update_average(self) -> None:
        self.average.update_parameters(self.model)

    @precondition(lambda self: self.average is not None)
    @rule()
    def convert_average(self) -> None:
        self._convert(self.average.module)

    @precondition(lambda self: self.average is not None and self.average.n_averaged > 0)
    @rule()
    def go_on_from_average(self) -> None:
        self.model.load_state_dict(self.average.module.state_dict())
        self.converted = None

    # --- evaluation -----------------------------------------------------------------------------------------------

    @rule(size=st.sampled_from([0, 1, 5]))
    def evaluate(self, size: int) -> None:
        output = self._evaluate(self._batch(size))
        assert output.shape == (size, CLASSES)
        assert output.isfinite().all()

    @rule()
    def evaluate_with_gradients(self) -> None:
        """The simulation."""
        assert self.model.eval()(self._batch(2)).isfinite().all()

    @precondition(lambda self: self.converted is None)
    @rule()
    def convert(self) -> None:
        self.converted = self._convert(self.model)

    # --- what holds -----------------------------------------------------------------------------------------------

    @invariant()
    def grids_are_grids(self) -> None:
        for model in (self.model, *([] if self.average is None else [self.average])):
            for node in nodes_of(model):
                scheme, scales, zero_points = node.scheme, node.scale.tolist(), node.zero_point.tolist()
                assert node.scale.dtype == torch.float32
                assert all(0 < scale < math.inf for scale in scales), node.name
                assert all(scheme.quant_min <= zero_point <= scheme.quant_max for zero_point in zero_points), node.name
                assert not scheme.symmetric or set(zero_points) == {scheme.symmetric_zero_point}, node.name

    @invariant()
    def nothing_is_nan(self) -> None:
        state = itertools.chain(self.model.named_parameters(), self.model.named_buffers())
        # An average of the infinities that stand for no data is NaN, and stands for the same.
        tensors = [tensor.detach().double().flatten() for name, tensor in state if "observer" not in name]
        assert not torch.cat(tensors).isnan().any()

    @invariant()
    def what_is_converted_computes_what_the_model_computes(self) -> None:
        if self.converted is not None:
            self._compare(self.model, self.converted, self.probe)

    # --- how ------------------------------------------------------------------------------------------------------

    @property
    def _takes_floats(self) -> bool:
        return VARIANTS[self.variant].make is Image

    def _batch(self, size: int) -> Tensor:
        batch = batch_of(self.variant, size, self.generator)
        return batch.to(self.dtype).contiguous(memory_format=self.memory_format) if self._takes_floats else batch

    def _some(self, which: int | None) -> list[FakeQuantizeLayer]:
        nodes = nodes_of(self.model)
        return nodes if which is None else [nodes[which % len(nodes)]]

    def _loss(self, batch: Tensor) -> Tensor:
        """Its gradient is bounded, so that no learning rate carries parameters to infinity in a few steps."""
        return F.cross_entropy(self.model(batch), torch.arange(len(batch)) % CLASSES, reduction="sum")

    def _step(self, batch: Tensor, learning_rate: float) -> None:
        self.converted = None
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=learning_rate)
        refusal = self._refusal_of_step() if len(batch) else None
        if refusal is not None:
            with pytest.raises(RuntimeError, match=refusal):
                self._loss(batch)
            return
        self._loss(batch).backward()
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        optimizer.step()
        self.model.zero_grad()

    def _refusal_of_step(self) -> str | None:
        """Documented: to train without an observer before any data was seen."""
        blind = [
            node
            for node in nodes_of(self.model)
            if not has_data(node) and not node.observer.enabled and node.fake_quantize_enabled
        ]
        return "has seen no data" if blind else None

    def _refusal(self, model: nn.Module | None = None) -> str | None:
        """The documented reason why a model does not convert."""
        nodes = nodes_of(self.model if model is None else model)
        if not all(node.fake_quantize_enabled for node in nodes):
            return "is switched off"
        if not all(map(has_data, nodes)):
            return "seen no data"
        return None

    def _output(self, model: nn.Module, batch: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return model.eval()(self.probe if batch is None else batch)

    def _evaluate(self, batch: Tensor) -> Tensor:
        if self.converted is not None:
            self._compare(self.model, self.converted, batch)
        return self._output(self.model, batch)

    def _compare(self, model: nn.Module, converted: nn.Module, batch: Tensor) -> None:
        assert same(self._output(converted, batch), self._output(model, batch))

    def _convert(self, model: nn.Module) -> nn.Module | None:
        refusal, before, mode = self._refusal(model), state_of(model), model.training
        converted = None
        if refusal is not None:
            with pytest.raises(RuntimeError, match=refusal):
                convert(model)
        elif self.dtype is torch.bfloat16:  # has too few digits for the codes of many grids
            try:
                converted = convert(model)
            except ValueError as error:
                if "model must compute in float32, got torch.bfloat16" not in str(error):
                    raise
        else:
            converted = convert(model)
        assert model.training == mode
        assert all(same(tensor, before[name]) for name, tensor in model.state_dict().items())
        if converted is not None:
            self._compare(model, converted, self.probe)
        return converted


def run(examples: int) -> None:
    run_state_machine_as_test(
        Interleavings,
        settings=settings(max_examples=examples, stateful_step_count=20, suppress_health_check=list(HealthCheck)),
    )


def test_50_interleavings() -> None:
    run(50)


@pytest.mark.long
def test_1000_interleavings() -> None:
    run(1000)
