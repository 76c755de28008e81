"""A model comes out of its file as it went in: converted, to the last bit; prepared, so that training goes on."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from example_effects import EFFECTS, WIDTH, Block, Model
from example_models import (
    EVERY_EXAMPLE,
    EXAMPLES,
    OTHERS_LONG,
    Example,
    all_equal,
    make_batch_norms_awkward,
    results,
    train_briefly,
)
from mlframework.quantization import (
    FakeQuantizeLayer,
    HistogramObserver,
    MinMaxObserver,
    QATConfig,
    QATSchedule,
    StraightThroughEstimator,
    calibrate,
    convert,
    export_onnx,
    load,
    prepare,
    save,
    verify,
)
from saved_files import DOCUMENT, parts_of


def prepared(example: Example, config: QATConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = example.make()
    make_batch_norms_awkward(model)
    model = prepare(model, config, example.inputs())
    calibrate(model, [example.inputs(8)])
    return model


def through_file(model: nn.Module, network: nn.Module, path: Path) -> nn.Module:
    save(model, path)
    return load(path, network)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    ones, others = one.state_dict(), other.state_dict()
    return list(ones) == list(others) and all(map(torch.equal, ones.values(), others.values()))


def same_results(one: nn.Module, other: nn.Module, inputs: tuple[Any, ...]) -> bool:
    with torch.no_grad():
        return all_equal(results(one, *inputs), results(other, *inputs))


@pytest.mark.filterwarnings("ignore:no data reached spare")
@EVERY_EXAMPLE
def test_a_converted_model_computes_the_same_codes(example: Example, tmp_path: Path) -> None:
    """By its programs and by its modules, which a hook asks for; and with another batch."""
    model = convert(prepared(example))
    loaded = through_file(model, example.make(), tmp_path / "model.safetensors")
    assert str(loaded) == str(model)
    assert type(loaded).__name__ == type(model).__name__
    assert same_state(loaded, model)
    assert same_results(loaded, model, example.inputs(3))
    for module in (*loaded.modules(), *model.modules()):
        module.register_forward_hook(lambda *args: None)
    assert same_results(loaded, model, example.inputs(2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no data reached spare")
@OTHERS_LONG
def test_a_prepared_model_trains_on_as_if_it_had_not_been_saved(example: Example, tmp_path: Path) -> None:
    model = prepared(example)
    train_briefly(model, example.inputs(), steps=1)
    loaded = through_file(model, example.make(), tmp_path / "model.safetensors")
    assert str(loaded) == str(model)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    inputs = example.inputs()
    for each in (model, loaded):
        torch.manual_seed(1)  # of dropouts
        train_briefly(each, inputs, steps=2)
    assert same_state(loaded, model)
    assert same_state(convert(loaded), convert(model))


CONFIGS: dict[str, Callable[[], QATConfig]] = {
    "2 bits": partial(QATConfig, weight_bits=2, activation_bits=2),
    "4 bits learned": partial(QATConfig, weight_bits=4, learnable=True),
    "per tensor": partial(QATConfig, per_channel_weights=False, target="tensorrt"),
    "3 bits of some": lambda: QATConfig(overrides={"block.*": QATConfig(weight_bits=3)}, skip=("*head*",)),
    "other observers": lambda: QATConfig(
        activation_observer=partial(HistogramObserver, update_every=3),
        estimator=StraightThroughEstimator("identity", gradient_clip=0.1),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_configuration_comes_back(config: Callable[[], QATConfig], tmp_path: Path) -> None:
    example = EXAMPLES["resnet"]
    model = prepared(example, config())
    train_briefly(model, example.inputs(), steps=2)
    loaded = through_file(model, example.make(), tmp_path / "model.safetensors")
    inputs = example.inputs()
    for each in (model, loaded):
        train_briefly(each, inputs, steps=2)
    assert same_state(loaded, model)
    model = convert(model)
    loaded = through_file(model, example.make(), tmp_path / "int8.safetensors")
    assert same_state(loaded, model)
    assert same_results(loaded, model, example.inputs(3))


def step_of(model: nn.Module, seed: int) -> float:
    torch.manual_seed(seed)
    random.seed(seed)
    loss = model(torch.randn(6, WIDTH)).square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    return float(loss.detach())


# Every second one in the long tests: to a file they are all the network's own code.
OWN_CODE = (
    "freezes",
    "reverses",
    "drops_layers",
    "counts",
    "checkpoints",
    "sets_a_buffer",
    "passes_a_gate",
    "iterates",
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no data reached")
@pytest.mark.parametrize(
    "effect",
    [pytest.param(effect, marks=pytest.mark.long if index % 2 else ()) for index, effect in enumerate(OWN_CODE)],
)
def test_what_the_networks_own_code_does_is_kept(effect: str, tmp_path: Path) -> None:
    """It comes from the network, with the layers in it from the file."""

    def network() -> nn.Module:
        return Model([Block(EFFECTS[effect]), Block(EFFECTS[effect])])

    model = prepare(network(), QATConfig(), (torch.randn(6, WIDTH),))
    step_of(model, 0)
    loaded = through_file(model, network(), tmp_path / "model.safetensors")
    assert [step_of(loaded, seed) for seed in (1, 2)] == [step_of(model, seed) for seed in (1, 2)]
    assert same_state(loaded, model)
    model = convert(model)
    loaded = through_file(model, network(), tmp_path / "model.safetensors")
    x = torch.randn(5, WIDTH)
    for each in (model, loaded):
        torch.manual_seed(0)
        random.seed(0)
        each.result = each(x)
    assert torch.equal(loaded.result, model.result)


def test_counters_and_switches_come_back(tmp_path: Path) -> None:
    """Observers that have been frozen, batch normalization that a schedule has, modes and frozen parameters."""
    example = EXAMPLES["cnn"]
    model = prepared(example)
    schedule = QATSchedule(model, observe_until=1, freeze_batch_norm_from=1)
    train_briefly(model, example.inputs(), steps=1)
    schedule.step()
    schedule.step()
    first = next(module for module in model.modules() if isinstance(module, FakeQuantizeLayer))
    first.fake_quantize_enabled = False
    next(model.parameters()).requires_grad_(False)
    model.train()
    loaded = through_file(model, example.make(), tmp_path / "model.safetensors")
    for one, other in zip(loaded.modules(), model.modules(), strict=True):
        assert one.training is other.training
        if isinstance(one, FakeQuantizeLayer):
            assert isinstance(other, FakeQuantizeLayer)
            assert one.fake_quantize_enabled is other.fake_quantize_enabled
            assert one.observer.enabled is other.observer.enabled
    assert [each.requires_grad for each in loaded.parameters()] == [each.requires_grad for each in model.parameters()]
    inputs = example.inputs()
    for each in (model, loaded):
        each.train()
        each(*inputs)
    assert same_state(loaded, model)


def test_a_model_that_is_loaded_in_inference_mode_trains(tmp_path: Path) -> None:
    example = EXAMPLES["cnn"]
    save(prepared(example), tmp_path / "model.safetensors")
    network = example.make()
    with torch.inference_mode():
        again = load(tmp_path / "model.safetensors", network)
    assert not any(tensor.is_inference() for tensor in again.state_dict(keep_vars=True).values() if tensor is not None)
    train_briefly(again, example.inputs())


def test_observers_of_one_name_in_two_modules_are_not_mixed_up(tmp_path: Path) -> None:
    kinds = [type("Widest", (MinMaxObserver,), {"__module__": module}) for module in ("one", "other")]
    model = prepare(nn.Sequential(nn.Linear(3, 2)), QATConfig(activation_observer=kinds[0]), (torch.randn(2, 3),))
    with pytest.raises(ValueError, match="Widest is a class of observers in one and in other"):
        save(model, tmp_path / "model.safetensors")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    example = EXAMPLES["tied"]
    model = prepared(example)
    loaded = through_file(model, example.make(), tmp_path / "model.safetensors")
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    assert len({id(each) for each in loaded.state_dict(keep_vars=True).values()}) == len(
        {id(each) for each in model.state_dict(keep_vars=True).values()}
    )


def test_it_is_saved_again_and_loads_again(tmp_path: Path) -> None:
    example = EXAMPLES["resnet"]
    model = convert(prepared(example))
    loaded = through_file(model, example.make(), tmp_path / "one.safetensors")
    again = through_file(loaded, example.make(), tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").stat().st_size == (tmp_path / "two.safetensors").stat().st_size
    assert same_state(again, model)
    assert same_results(again, model, example.inputs())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(3)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_blocks_of_one_kind_have_one_forward_in_the_file(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 5, 5)
    model = prepare(Twice(), QATConfig(), (x,))
    calibrate(model, [x])
    int8_model = convert(model)
    again = through_file(int8_model, Twice(), tmp_path / "model.safetensors")
    assert torch.equal(again(x), int8_model(x))
    assert isinstance(again.blocks, nn.Sequential)
    _, second, third = again.blocks  # the first takes floats
    assert type(second) is type(third)
    _, metadata = parts_of(tmp_path / "model.safetensors")
    sources = json.loads(metadata[DOCUMENT])["sources"]
    assert len(sources) == len({json.dumps(source) for source in sources}) == 4  # with those of what contains them


def test_networks_without_weights_do(tmp_path: Path) -> None:
    """As made on the meta device, which takes no time."""
    example = EXAMPLES["resnet"]
    model = convert(prepared(example))
    save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        network = example.make()
    loaded = load(tmp_path / "model.safetensors", network)
    assert same_results(loaded, model, example.inputs())


class Outer(nn.Module):
    """A model of which a part is prepared."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1))
        self.inner = EXAMPLES["mlp"].make()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


@pytest.mark.parametrize("is_converted", [False, True])
def test_models_around_a_prepared_one_do(is_converted: bool, tmp_path: Path) -> None:
    example, model = EXAMPLES["mlp"], Outer()
    model.inner = prepare(model.inner, QATConfig(), example.inputs())
    calibrate(model.inner, [example.inputs(8)])
    model = convert(model) if is_converted else model.eval()
    loaded = through_file(model, Outer(), tmp_path / "model.safetensors")
    assert same_results(loaded, model, example.inputs())
    assert same_state(loaded, model)
    if not is_converted:
        loaded = convert(through_file(loaded, Outer(), tmp_path / "again.safetensors"))
        assert same_results(loaded, model, example.inputs())


@pytest.mark.slow
def test_a_loaded_model_is_compiled_and_exported(tmp_path: Path) -> None:
    example = EXAMPLES["mlp"]
    origin = prepared(example).eval()
    model = convert(origin)
    save(model, tmp_path / "model.safetensors")
    compiled: Any = torch.compile(load(tmp_path / "model.safetensors", example.make()), backend="eager", fullgraph=True)
    assert same_results(compiled, model, example.inputs())
    loaded = load(tmp_path / "model.safetensors", example.make())
    inputs = example.inputs(4)
    export_onnx(loaded, inputs, tmp_path / "model.onnx")
    verify(origin, [inputs], converted=loaded, path=tmp_path / "model.onnx")


IN_ANOTHER_PROCESS = """
import sys
sys.modules["safetensors"] = None
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)  # as here: float sums of several threads have another order
from example_models import EXAMPLES, results
from mlframework.quantization import convert, load
loading = torch.load
def refused(*args, **kwargs):
    raise AssertionError("unpickled")
torch.load = torch.serialization.load = refused
folder = sys.argv[1]
given = loading(f"{folder}/given.pt")
found = {}
for name in given["converted"]:
    model = load(f"{folder}/{name}.safetensors", EXAMPLES[name].make())
    with torch.no_grad():
        found[name] = [results(model, *inputs) for inputs in given["converted"][name]]
model = load(f"{folder}/prepared.safetensors", EXAMPLES["transformer"].make())
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
optimizer.load_state_dict(given["optimizer"])
torch.manual_seed(1)
for inputs in given["batches"]:
    optimizer.zero_grad()
    model(*inputs).square().mean().backward()
    optimizer.step()
found["trained"] = [*model.state_dict().values(), *convert(model).state_dict().values()]
torch.save(found, f"{folder}/found.pt")
"""


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, ...]]) -> None:
    for inputs in batches:
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()


@pytest.mark.slow
def test_another_process_computes_the_same_codes_and_trains_on_without_pickle_or_safetensors(tmp_path: Path) -> None:
    """Networks of convolutions, of attention, with containers that are called twice; with batches of other sizes."""
    given: dict[str, Any] = {"converted": {}}
    expected: dict[str, Any] = {}
    for name in ("resnet", "transformer", "called twice"):
        example = EXAMPLES[name]
        model = convert(prepared(example))
        save(model, tmp_path / f"{name}.safetensors")
        given["converted"][name] = [example.inputs(1), example.inputs(7)]
        with torch.no_grad():
            expected[name] = [results(model, *inputs) for inputs in given["converted"][name]]
    example = EXAMPLES["transformer"]
    model = prepared(example, QATConfig(learnable=True)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, [example.inputs(), example.inputs()])
    save(model, tmp_path / "prepared.safetensors")
    given["optimizer"], given["batches"] = copy.deepcopy(optimizer.state_dict()), [example.inputs(), example.inputs(3)]
    torch.save(given, tmp_path / "given.pt")
    torch.manual_seed(1)
    train(model, optimizer, given["batches"])
    expected["trained"] = [*model.state_dict().values(), *convert(model).state_dict().values()]
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path), str(Path(__file__).parents[1])]
    subprocess.run(command, check=True)
    found = torch.load(tmp_path / "found.pt")
    for name in given["converted"]:
        assert all(map(all_equal, found[name], expected[name]))
    assert all_equal(found["trained"], expected["trained"])


def test_what_is_there_stays_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, path = EXAMPLES["mlp"], tmp_path / "model.safetensors"
    model = convert(prepared(example))
    save(model, path)
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(convert(prepared(EXAMPLES["cnn"])), path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_exporting_a_loaded_model_by_torch_itself_takes_one_call_before(tmp_path: Path) -> None:
    """What is traced stands for tensors of which nothing can be packed."""
    example = EXAMPLES["mlp"]
    model = through_file(convert(prepared(example)), example.make(), tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="must have been called once, since it was loaded, before it is exported"):
        torch.export.export(model, example.inputs())
    model(*example.inputs())
    program: Any = torch.export.export(model, example.inputs()).module()
    inputs = example.inputs()
    assert all_equal(results(program, *inputs), results(model, *inputs))
