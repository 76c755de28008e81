"""What cannot be kept in a file is refused before one is written, and files of other networks before one is changed."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import QATConfig, calibrate, convert, load, prepare, save


class Network(nn.Module):
    def __init__(self, width: int = 8, kernel: int = 3, pool: int = 2, extra: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, kernel, padding=kernel // 2)
        self.pool = nn.MaxPool2d(pool)
        self.head = nn.Linear(width, 2)
        self.phase = "training"
        if extra:
            self.extra = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.conv(x).relu()).mean((2, 3)))


class OtherNetwork(Network):
    pass


IMAGES = torch.randn(4, 3, 8, 8)


def prepared(network: nn.Module | None = None) -> nn.Module:
    model = prepare(Network() if network is None else network, QATConfig(), (IMAGES,))
    calibrate(model, [IMAGES])
    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save(convert(prepared()), path)
    return path


def with_hook() -> nn.Module:
    network = Network()
    network.pool.register_forward_hook(lambda module, args, output: output * 2)
    return network


def with_method() -> nn.Module:
    network = Network()
    network.pool.forward = lambda x: x  # type: ignore[method-assign]
    return network


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "class": (OtherNetwork, "class of the network must be Network, got OtherNetwork"),
    "width": (lambda: Network(width=9), r"weight of conv must be \[8, 3, 3, 3\], got \[9, 3, 3, 3\]"),
    "kernel": (lambda: Network(kernel=1), r"weight of conv must be \[8, 3, 3, 3\], got \[8, 3, 1, 1\]"),
    "setting": (lambda: Network(pool=4), "kernel_size of pool must be 2, got 4"),
    "more": (lambda: Network(extra=True), "this one has extra, a torch.nn.modules.linear.Linear, and it has not"),
    "none of it": (lambda: nn.Linear(3, 2), "it has conv, a torch.nn.modules.conv.Conv2d, and this one has not"),
    "hook": (with_hook, r"hooks of pool must be None, got \['with_hook.<locals>.<lambda>'\]"),
    "method": (with_method, r"methods of pool must be None, got \['forward'\]"),
}


def contents(module: nn.Module) -> list[Any]:
    """All that loading could change: classes, attributes, children, tensors and their values."""
    found: list[Any] = []
    for name, each in module.named_modules():
        found += [name, type(each), each.training, sorted(vars(each)), list(each._modules)]
        tensors = [*each._parameters.items(), *each._buffers.items()]
        found += [(key, id(tensor), tensor.data_ptr(), tensor.tolist()) for key, tensor in tensors]
    return found


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS)
def test_a_file_of_another_network_is_refused(make: Callable[[], nn.Module], message: str, path: Path) -> None:
    network = make()
    before = contents(network)
    with pytest.raises(ValueError, match=rf"model.safetensors' is of another network: {message}"):
        load(path, network)
    assert contents(network) == before


def test_networks_with_quantization_in_them_are_refused(path: Path) -> None:
    for model in (prepared(), convert(prepared())):
        with pytest.raises(TypeError, match="network must be a float network, got a Network with quantization in it"):
            load(path, model)
    with pytest.raises(TypeError, match=r"network must be a torch.nn.Module, got type"):
        load(path, Network)  # type: ignore[arg-type]


def test_float_models_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model must be prepared or converted, got Network: call prepare\(\)"):
        save(Network(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


class Pooling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def add_hook(model: nn.Module) -> None:
    model.pool.register_forward_hook(lambda *args: None)


def replace_method(model: nn.Module) -> None:
    model.pool.forward = lambda x: x


def put_module(model: nn.Module) -> None:
    model.pool = Pooling()


def hook_wrapper(model: nn.Module) -> None:
    model.conv.register_forward_hook(lambda *args: None)


def leave_meta(model: nn.Module) -> None:
    model.register_buffer("lost", torch.empty(2, device="meta"))


def complex_numbers(model: nn.Module) -> None:
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex64))


def hook_backward(model: nn.Module) -> None:
    model.head.register_full_backward_hook(lambda *args: None)


def hook_state(model: nn.Module) -> None:
    model.pool.register_state_dict_post_hook(lambda *args: None)


def hook_tensor(model: nn.Module) -> None:
    next(model.parameters()).register_hook(lambda gradient: gradient)


def tie_by_data(model: nn.Module) -> None:
    model.extra = nn.Parameter(torch.zeros(2))
    model.tied = nn.Parameter(torch.zeros(2))
    model.tied.data = model.extra.data


def rename_a_phase(model: nn.Module) -> None:
    model.phase = "fine-tuning"


def odd_name(model: nn.Module) -> None:
    model.register_buffer("it's", torch.zeros(1))


REFUSED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "hook": (add_hook, r"pool has the hooks \['add_hook.<locals>.<lambda>'\], and had \[\] when it was prepared"),
    "hook of a wrapper": (hook_wrapper, "conv has a hook of function, which a file does not hold"),
    "method": (replace_method, r"pool has the methods \['forward'\] replaced, and had \[\]"),
    "module": (put_module, r"pool cannot be kept in a file: .*Pooling is not among the classes"),
    "backward hook": (hook_backward, "head has a hook of function, which a file does not hold"),
    "hook of a state": (hook_state, r"pool has the hooks \['hook_state.<locals>.<lambda>'\], and had \[\]"),
    "hook of a tensor": (hook_tensor, "conv.weight has a hook of its own, which a file does not hold"),
    "tied by data": (tie_by_data, "tied shares its memory with extra, which a file does not hold"),
    "text": (rename_a_phase, "the model has the phase 'fine-tuning', and had 'training' when it was prepared"),
    "name": (odd_name, 'the model has something called "it\'s", a name that a file does not hold'),
    "meta": (leave_meta, "lost is on the meta device"),
    "complex": (complex_numbers, "phases is a Tensor of torch.complex64"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_file_does_not_hold_is_named(change: Callable[[nn.Module], None], message: str, tmp_path: Path) -> None:
    model = prepared()
    change(model)
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_computed_weights_of_a_prepared_model_are_refused_and_of_a_converted_one_kept(tmp_path: Path) -> None:
    def network() -> nn.Module:
        made = Network()
        nn.utils.parametrizations.weight_norm(made.conv)
        return made

    model = prepared(network())
    with pytest.raises(ValueError, match=r"conv cannot be kept in a file: .*ParametrizedQATModuleWrapper"):
        save(model, tmp_path / "model.safetensors")
    model = convert(model)
    save(model, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors", network())(IMAGES), model(IMAGES))


def test_saving_without_safetensors_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"save needs safetensors .*'mlframework-quantization\[saving\]'"):
        save(convert(prepared()), tmp_path / "model.safetensors")


def test_hooks_and_methods_of_the_network_itself_are_no_harm(tmp_path: Path) -> None:
    for make in (with_hook, with_method):
        model = convert(prepared(make()))
        save(model, tmp_path / "model.safetensors")
        assert torch.equal(load(tmp_path / "model.safetensors", make())(IMAGES), model(IMAGES))


class Holder:
    def __init__(self) -> None:
        self.weight = torch.ones(4)


class Slotted:
    __slots__ = ("__weight", "empty")

    def __init__(self) -> None:
        self.__weight = torch.ones(4)


def closure() -> Callable[[], Tensor]:
    weight = torch.ones(4)
    return lambda: weight


class RunsItsOwnCode(nn.Module):
    """Which a graph does not hold: its way depends on values."""

    def __init__(self, hidden: Any) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


HIDDEN: dict[str, Callable[[], Any]] = {
    "list of modules": lambda: [nn.Linear(4, 4)],
    "dictionary of modules": lambda: {"one": {"two": nn.Linear(4, 4)}},
    "object with a tensor": Holder,
    "queue": lambda: deque([torch.ones(4)]),
    "object with slots": Slotted,
    "closure": closure,
    "partial": lambda: partial(torch.add, torch.ones(4)),
    "array": lambda: {"weight": np.ones(4)},
}


@pytest.mark.parametrize("make", HIDDEN.values(), ids=HIDDEN)
def test_tensors_that_no_file_finds_are_named(make: Callable[[], Any], tmp_path: Path) -> None:
    """They would be the new network's, in silence."""
    x = torch.randn(6, 4)
    model = prepare(nn.Sequential(nn.Linear(4, 4), RunsItsOwnCode(make()), nn.Linear(4, 2)), QATConfig(), (x,))
    with pytest.raises(ValueError, match=r"1 has a (Linear|Tensor|ndarray) inside of its attribute hidden"):
        save(model, tmp_path / "model.safetensors")
    model = prepare(nn.Sequential(nn.Linear(4, 4), RunsItsOwnCode([1, 2]), nn.Linear(4, 2)), QATConfig(), (x,))
    save(model, tmp_path / "model.safetensors")


class Scaled(nn.Module):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(4, 4), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.factor


class WithSet(Network):
    def __init__(self) -> None:
        super().__init__()
        self.kinds = set(map(str, range(100)))


def test_sets_of_text_may_come_in_another_order(tmp_path: Path) -> None:
    """As copies of them do."""
    model: Any = prepared(WithSet())
    kinds: set[str] = set()
    kinds.update(sorted(model.kinds))
    model.kinds = kinds
    save(model, tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors", WithSet()).kinds == model.kinds


def test_values_of_the_networks_attributes_come_from_the_file_and_text_from_the_network(tmp_path: Path) -> None:
    network, other = Scaled(3.0), Scaled()
    for each, where in ((network, "here"), (other, "there")):
        vars(each)["where"] = where
    model = prepare(network, QATConfig(), (torch.randn(6, 4),))
    save(model, tmp_path / "model.safetensors")
    loaded: Any = load(tmp_path / "model.safetensors", other)
    assert (loaded.factor, loaded.where) == (3.0, "there")
