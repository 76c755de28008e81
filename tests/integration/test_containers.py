"""Containers stay modules: a prepared and a converted model call them, and their hooks see what they ever saw."""

from __future__ import annotations

import copy
import linecache
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

from example_containers import IMAGES, Network, calibrated, disabled, prepared
from example_models import train_briefly
from mlframework.quantization import FakeQuantizeLayer, QATConfig, convert, prepare
from mlframework.quantization.graph.containers import begins, graph_of, is_mark
from zoo import NETWORKS

pytestmark = pytest.mark.slow

CONTAINERS = ("stem", "blocks", "blocks.0", "blocks.0.body", "blocks.1", "blocks.1.body", "twice", "twice.body")


def seen_by_hooks(model: nn.Module, x: Tensor, names: tuple[str, ...] = CONTAINERS) -> list[tuple[str, Tensor, Tensor]]:
    """What forward hooks see of every call of these containers, in order."""
    seen: list[tuple[str, Tensor, Tensor]] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.append((name, args[0].clone(), output.clone()))
        )
        for name in names
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def assert_alike(ones: list[tuple[str, Tensor, Tensor]], others: list[tuple[str, Tensor, Tensor]]) -> None:
    assert [name for name, _, _ in ones] == [name for name, _, _ in others]
    for (_, given, result), (_, other_given, other_result) in zip(ones, others, strict=True):
        assert torch.equal(given, other_given)
        assert torch.equal(result, other_result)


@pytest.mark.parametrize("training", [True, False])
def test_hooks_put_on_containers_see_what_the_float_model_shows(training: bool) -> None:
    model = Network()
    result = disabled(prepared(model)).train(training)
    expected = seen_by_hooks(model.train(training), IMAGES)
    assert len(expected) == 10
    assert_alike(seen_by_hooks(result, IMAGES), expected)


def test_hooks_on_a_converted_model_see_the_values_of_the_prepared_one() -> None:
    result = calibrated()
    converted = convert(result)
    with torch.no_grad():
        expected = result(IMAGES)
        assert_alike(seen_by_hooks(converted, IMAGES), seen_by_hooks(result, IMAGES))
        assert torch.equal(converted(IMAGES), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet20", "mobilenet_v2", "unet", "gpt", "transformers_bert", "transformers_convnext"]
)
def test_every_container_of_a_network_is_called(name: str) -> None:
    network = NETWORKS[name]
    model = network.make().eval()
    inputs = network.example_inputs(2)
    result = disabled(prepare(model, QATConfig(), inputs)).eval()

    def called(model: nn.Module, names: list[str]) -> list[str]:
        order: list[str] = []
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_hook(lambda module, args, output, name=name: order.append(name))
        model(*inputs)
        return order

    containers = [name for name, module in model.named_modules() if name and any(True for _ in module.children())]
    assert called(result, containers) == called(model, containers)


def test_a_trace_of_a_converted_model_knows_its_containers() -> None:
    marks = [node for node in graph_of(convert(calibrated())).nodes if is_mark(node) and node.target is begins]
    assert [node.args[0] for node in marks] == [
        "stem", "blocks", "blocks.0", "blocks.0.body", "blocks.1", "blocks.1.body", *["twice", "twice.body"] * 2
    ]  # fmt: skip


def test_a_hook_changes_what_follows() -> None:
    model = Network().eval()
    result = disabled(prepared(model)).eval()
    before = result(IMAGES)
    for each in (model, result):
        each.blocks.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(result(IMAGES), model(IMAGES))
    assert not torch.equal(result(IMAGES), before)


def test_other_methods_find_floats_in_containers() -> None:
    result = calibrated()
    converted = convert(result)
    with torch.no_grad():
        features = converted.features(IMAGES)
        assert features.dtype is torch.float32
        assert torch.equal(features, result.features(IMAGES))
        assert torch.equal(converted.blocks(converted.stem(IMAGES)), result.blocks(result.stem(IMAGES)))


def test_a_block_called_twice_has_nodes_for_each_call() -> None:
    result = calibrated()
    nodes = {name for name, module in result.twice.named_modules() if isinstance(module, FakeQuantizeLayer)}
    assert len([name for name in nodes if "output_fake_quantize" in name]) == 4
    with torch.no_grad():
        assert torch.equal(convert(result)(IMAGES), result(IMAGES))


def test_sequences_stay_as_long_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for result in (prepared(model), convert(calibrated(model))):
        assert len(result) == 4
        assert [type(module) for module in result][2] is nn.Flatten
        assert result[-1] is result.get_submodule("3")
        assert len(result[1:3]) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_wrapper_may_be_put_around_a_block(reentrant: bool) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl

    model = Network()
    results = [calibrated(copy.deepcopy(model)).train() for _ in range(2)]
    results[1].load_state_dict(results[0].state_dict())
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    results[1].blocks[0] = checkpoint_wrapper(results[1].blocks[0], checkpoint_impl=kind)
    outputs = [result(IMAGES) for result in results]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    gradients = [[parameter.grad for parameter in result.parameters()] for result in results]
    assert all(map(torch.equal, *gradients))


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("_one_rank")
@pytest.mark.filterwarnings("ignore")  # what fully_shard has to say of a mesh of one CPU
def test_blocks_may_be_sharded() -> None:
    whole = prepared()
    sharded = copy.deepcopy(whole)
    for block in (sharded.stem, *sharded.blocks, sharded.twice, sharded):
        fully_shard(block)
    for model in (whole, sharded):
        train_briefly(model, (IMAGES,), steps=3)
    for (name, parameter), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(parameter, other.full_tensor()), name


# --- calls with other arguments ---


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, gate: Tensor | None = None, **options: float) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return (y if gate is None else y * gate) * options.get("factor", 1.0)


def test_a_converted_model_says_what_it_was_prepared_with() -> None:
    converted = convert(calibrated(nn.Sequential(Gated(), nn.Conv2d(4, 2, 1))))
    with pytest.raises(TypeError, match="must be called as in the example that it was prepared with"):
        converted[0](IMAGES, torch.ones(4, 4, 1, 1))


def test_weights_are_quantized_also_in_calls_with_other_arguments() -> None:
    model, gate = Gated().eval(), torch.rand(4, 4, 1, 1)
    result = calibrated(model)
    with torch.no_grad():
        actual, expected = result(IMAGES, gate, factor=2.0), model(IMAGES, gate, factor=2.0)
        assert not torch.equal(actual, expected)
        # The weight's rounding alone.
        torch.testing.assert_close(actual, expected, atol=0.05, rtol=0)
        assert torch.equal(result(IMAGES), convert(result)(IMAGES))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, gate: Tensor | None = None, *rest: Tensor, bias: Tensor, **others: Tensor) -> Tensor:
        y = self.layer(x) if gate is None else self.layer(x) * gate
        return sum((*rest, *others.values()), y + bias)


@pytest.mark.parametrize("given", ["bias", "gate", "all"])
def test_every_kind_of_parameter(given: str) -> None:
    x, more = torch.randn(3, 4), [torch.randn(3, 4) for _ in range(4)]
    args = {"bias": (x,), "gate": (x, more[0]), "all": (x, more[0], more[1])}[given]
    kwargs = {"bias": more[2], **({"other": more[3]} if given == "all" else {})}
    model = Keywords().eval()
    result = disabled(prepare(model, QATConfig(quantize_last_linear=True), args, kwargs)).eval()
    calls: list[tuple[tuple[Tensor, ...], dict[str, Tensor]]] = [
        (args, kwargs),
        ((x,), {"bias": more[0]}),
        ((x, more[1]), {"bias": more[0]}),
        ((x, more[1], more[2], more[3]), {"bias": more[0], "a": x, "b": more[1]}),
    ]
    for each, named in calls:
        assert torch.equal(result(*each, **named), model(*each, **named))


def test_preparing_changes_nothing_of_the_model() -> None:
    class Clips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.layer.weight.data.clamp_(-0.1, 0.1)
            return self.layer(x)

    model = nn.Sequential(Clips(), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    prepare(model, QATConfig(), (torch.randn(2, 4),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.alpha, self.unread = nn.Linear(4, 4), 0.5, 1

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.alpha


def test_attributes_that_the_trace_has_read_are_not_set_in_silence() -> None:
    result = prepare(nn.Sequential(Weighted(), nn.ReLU()), QATConfig(), (torch.randn(2, 4),))
    result[0].unread, result[0].alpha = 2, 0.5
    for each in (result, copy.deepcopy(result)):
        with pytest.warns(UserWarning, match=r"Weighted.alpha is set to 0.25, but its traced forward goes on with 0.5"):
            each[0].alpha = 0.25


class MomentumEncoder(nn.Module):
    """One layer's weights follow another's."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
                    slow.mul_(0.9).add_(fast, alpha=0.1)
        return self.fast(x) + self.slow(x)


def test_weights_that_follow_others_go_on_doing_so() -> None:
    model = nn.Sequential(MomentumEncoder(), nn.ReLU())
    result = disabled(prepare(copy.deepcopy(model), QATConfig(), (torch.randn(2, 4),)))
    for _ in range(3):
        x = torch.randn(2, 4)
        assert torch.equal(result(x), model(x))
    assert all(map(torch.equal, result.parameters(), model.parameters()))


class DropsOut(nn.Sequential):
    """Calls a dropout that is no module of it, and becomes one."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.2, self.training)


def test_sequences_with_code_of_their_own_stay_as_long_too() -> None:
    result = prepare(DropsOut(nn.Linear(4, 4), nn.ReLU()), QATConfig(), (torch.randn(2, 4),))
    assert len(result) == 2
    assert [type(module) for module in result][1] is nn.ReLU


def test_sequences_refuse_to_change_their_length() -> None:
    result = prepared()
    for change in (lambda: result.stem.append(nn.ReLU()), lambda: result.stem.pop(-1)):
        with pytest.raises(TypeError, match="must stay as long as it is"):
            change()
    with pytest.raises(TypeError, match="must stay as long as it is"):
        del result.stem[-1]


# --- copies ---


def test_copies_and_pickles_share_one_source() -> None:
    result = calibrated()
    copies: list[nn.Module] = [copy.deepcopy(result), pickle.loads(pickle.dumps(result))]
    size = len(linecache.cache)
    for _ in range(3):
        copies += [copy.deepcopy(result), pickle.loads(pickle.dumps(copies[-1])), convert(result)]
    with torch.no_grad():
        assert all(torch.equal(each(IMAGES), copies[0](IMAGES)) for each in copies)
    # The first conversion makes classes of its own.
    assert len(linecache.cache) <= size + len(CONTAINERS) + 2
