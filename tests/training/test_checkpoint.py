"""The file of an interrupted training: refused whole where it does not fit, and never half written."""

from __future__ import annotations

import copy
import functools
import signal
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import QATConfig, QATSchedule, Recipe, calibrate, finetune, prepare
from mlframework.quantization.training.checkpoint import read_checkpoint, write_checkpoint
from mlframework.quantization.training.training_loop import TrainingLoop

pytestmark = pytest.mark.slow

BATCHES = [torch.randn(8, 4) for _ in range(3)]
RECIPE = Recipe(freeze_oscillations=True)  # with a state to start over from


def networks(width: int = 3) -> tuple[nn.Module, nn.Module]:
    return copy.deepcopy(_networks(width))


@functools.cache
def _networks(width: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
    model = prepare(copy.deepcopy(teacher), QATConfig(weight_bits=4, learnable=True), (BATCHES[0],))
    calibrate(model, BATCHES)
    return model, teacher


def interrupted(path: Path, recipe: Recipe = RECIPE, width: int = 3) -> None:
    """Leaves the checkpoint of a training that two steps were taken of."""
    path.write_bytes(_interrupted(recipe, width))


@functools.cache
def _interrupted(recipe: Recipe, width: int) -> bytes:
    model, teacher = networks(width)
    calls: list[Any] = []
    before = 0 if recipe.lr is not None else 4  # batches that tell the learning rate

    def interrupt(module: nn.Module, args: Any) -> None:
        calls.append(args)
        if len(calls) == before + 3:
            raise KeyboardInterrupt

    teacher.register_forward_pre_hook(interrupt)
    with TemporaryDirectory() as folder:
        path = Path(folder, "tuning.pt")
        with pytest.raises(KeyboardInterrupt):
            finetune(model, teacher, BATCHES, steps=4, recipe=recipe, checkpoint=path)
        return path.read_bytes()


def assert_refused(path: Path, message: str, recipe: Recipe = RECIPE) -> None:
    model, teacher = networks()
    before, content = copy.deepcopy(model.state_dict()), path.read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        finetune(model, teacher, BATCHES, steps=4, recipe=recipe, checkpoint=path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert path.read_bytes() == content


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "tuning.pt"
    interrupted(path)
    content = path.read_bytes()
    for length in (*range(0, len(content), 61), *range(len(content) - 30, len(content))):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"tuning.pt' must be a whole file of finetune\(\), got one that cannot"):
            read_checkpoint(path)
    for length in (0, 1, 1000, len(content) - 1):
        path.write_bytes(content[:length])
        assert_refused(path, "must be a whole file")
    path.write_bytes(content)
    finetune(*networks(), BATCHES, steps=4, recipe=RECIPE, checkpoint=path)


@pytest.mark.parametrize("learnable", [False, True])
def test_an_interruption_in_the_middle_of_a_step_waits_for_its_end(learnable: bool, tmp_path: Path) -> None:
    """Observers have seen the batch by then, and would see it again."""

    def run(path: Path | None) -> tuple[nn.Module, list[float]]:
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        model = prepare(copy.deepcopy(teacher), QATConfig(learnable=learnable), (BATCHES[0],))
        calibrate(model, BATCHES)
        calls: list[Any] = []

        def interrupt(module: nn.Module, args: Any) -> None:
            calls.append(args)
            if len(calls) == 2 and path is not None and not path.exists():
                signal.raise_signal(signal.SIGINT)

        teacher.register_forward_pre_hook(interrupt)
        recipe = Recipe(lr=1e-2, observe_until=1.0)
        return model, finetune(model, teacher, BATCHES, steps=4, recipe=recipe, checkpoint=path).losses

    path = tmp_path / "tuning.pt"
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert len(read_checkpoint(path)["losses"]) == 2
    (model, losses), (expected, expected_losses) = run(path), run(None)
    assert losses == expected_losses
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Harmful:
    """Would be made by code of its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise AssertionError('it was unpickled')",))


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "tuning.pt"
    path.write_text("something else")
    assert_refused(path, "must be a whole file")
    torch.save({"model": Harmful()}, path)
    assert_refused(path, "must be a whole file")
    torch.save(networks()[0].state_dict(), path)
    assert_refused(path, r"state_dict must have the fields \['backing_off', 'freezer', 'learning_rates', 'losses'")
    torch.save([1], path)
    assert_refused(path, "state_dict must be a dictionary")
    with pytest.raises(IsADirectoryError):
        finetune(*networks(), BATCHES, steps=4, checkpoint=tmp_path)


def test_another_trainings_file(tmp_path: Path) -> None:
    path = tmp_path / "tuning.pt"
    interrupted(path, width=5)
    assert_refused(path, "optimizer's exp_avg of parameter 0 must be of shape")
    interrupted(path.with_name("2"), Recipe())
    assert_refused(path.with_name("2"), "state_dict must be a dictionary of")
    interrupted(path.with_name("3"))
    assert_refused(path.with_name("3"), "freezer must be None", Recipe())
    given = Recipe(lr=1e-3, freeze_oscillations=True)
    assert_refused(path.with_name("3"), "backing_off must be None as the learning rate is given", given)


def _first(tensors: dict[Any, Any]) -> Any:
    return tensors[next(iter(tensors))]


TAMPERINGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a field": (lambda state: state.pop("losses"), "must have the fields"),
    "no model": (lambda state: state.update(model=None), "model must be a state_dict"),
    "the model": (lambda state: state["model"].update({"2.bias": torch.ones(3)}), "size mismatch for 2.bias"),
    "a scale": (lambda state: state["model"]["0.weight_fake_quantize.scale"].fill_(torch.nan), "finite and positive"),
    "an optimizer's field": (lambda state: state["optimizer"].pop("state"), "optimizer must have the fields"),
    "a group": (lambda state: state["optimizer"]["param_groups"].pop(), "optimizer must have groups of"),
    "a group's field": (
        lambda state: state["optimizer"]["param_groups"][1].pop("betas"),
        "group 1 must have the fields",
    ),
    "a momentum": (
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(7)),
        "exp_avg of parameter 0",
    ),
    "a missing momentum": (
        lambda state: state["optimizer"]["state"][0].pop("exp_avg"),
        "optimizer's state of parameter 0 must have the fields",
    ),
    "no momenta": (lambda state: state["optimizer"]["state"].update({0: 5}), "parameter 0 must be a dictionary"),
    "a rate": (
        lambda state: state["optimizer"]["param_groups"][0].update(lr="x"),
        "lr of group 0 must be a finite float",
    ),
    "betas": (
        lambda state: state["optimizer"]["param_groups"][0].update(betas=3),
        "betas of group 0 must be a tuple of 2",
    ),
    "rates": (lambda state: state["scheduler"].update(base_lrs=[1.0]), "scheduler's base_lrs must be a list of"),
    "no number": (lambda state: state["scheduler"].update(last_epoch="x"), "last_epoch must be a finite int, got 'x'"),
    "a loss": (lambda state: state["losses"].__setitem__(0, torch.ones(3)), "losses and learning_rates must be lists"),
    "another's": (lambda state: state["optimizer"]["state"].update({99: {}}), "parameters, got that of others"),
    "the schedule": (lambda state: state["scheduler"].pop("base_lrs"), "scheduler must have the fields"),
    "the freezer": (lambda state: state["freezer"].update(steps_taken=-1), "steps_taken must be a number of steps"),
    "a layer": (lambda state: state["freezer"]["layers"].update(x={}), "must be of layers of the model"),
    "a tracker": (lambda state: _first(state["freezer"]["layers"]).pop("average"), "must have the fields"),
    "a frequency": (
        lambda state: _first(state["freezer"]["layers"]).update(frequency=torch.ones(7)),
        "frequency must be of shape",
    ),
    "what is kept": (lambda state: state["backing_off"].pop("kept"), "backing_off must have the fields"),
    "what it began with": (
        lambda state: state["backing_off"]["start"].clear(),
        "backing_off's start state must have the fields",
    ),
    "a tensor it began with": (
        lambda state: state["backing_off"]["start"]["tensors"].pop("2.bias"),
        "backing_off's tensors must have the fields",
    ),
    "the least loss": (lambda state: state["backing_off"].update(least=None), "least must be a float, got None"),
    "a kept loss": (lambda state: state["backing_off"]["kept"].update(loss=torch.nan), "loss must be a float, got nan"),
    "a kept tensor": (
        lambda state: state["backing_off"]["kept"]["tensors"].update({"2.bias": torch.ones(3)}),
        r"2.bias must be of \(2,\) and torch.float32, got",
    ),
    "a kept momentum": (
        lambda state: state["backing_off"]["kept"]["optimizer"]["param_groups"].pop(),
        "optimizer must have groups of",
    ),
    "a start": (lambda state: state.update(started=3), "started must be an int between 0 and the 2 steps taken"),
    "the history": (lambda state: state["learning_rates"].pop(), "losses and learning_rates must be lists"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_state_changes_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tuning.pt"
    interrupted(path)
    state = read_checkpoint(path)
    tamper, message = TAMPERINGS[name]
    tamper(state)
    model, teacher = networks()
    loop = TrainingLoop(model, teacher, None, RECIPE, 4)
    before = copy.deepcopy(loop.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=message):
        loop.load_state_dict(state)
    assert _same(loop.state_dict(), before)
    write_checkpoint(state, path)
    assert_refused(path, message)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_file_before(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuning.pt"
    interrupted(path)
    content = path.read_bytes()

    def half(state: Any, file: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(error):
        write_checkpoint({}, path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("steps", [None, -1, 1.5, True, "3"])
def test_a_schedules_state(steps: Any) -> None:
    schedule = QATSchedule(networks()[0], observe_until=2)
    schedule.step()
    with pytest.raises(ValueError, match="state_dict must hold a number of steps from 0, got"):
        schedule.load_state_dict({"steps": steps})
    assert schedule.state_dict() == {"steps": 1}
