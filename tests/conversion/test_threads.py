"""A converted model, and a prepared one in evaluation, give from many threads at once what they give alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from example_models import EXAMPLES, train_briefly
from mlframework.quantization import QATConfig, convert, prepare

THREADS = 8
# Batches of several sizes, and images of two.
INPUTS = [EXAMPLES["resnet"].inputs(1 + index % 5, odd=index % 2 == 1)[0] for index in range(2 * THREADS)]


def trained() -> nn.Module:
    torch.manual_seed(0)
    prepared = prepare(EXAMPLES["resnet"].make(), QATConfig(), EXAMPLES["resnet"].inputs())
    train_briefly(prepared, EXAMPLES["resnet"].inputs(8))
    return prepared.eval()


def outputs(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [model(inputs) for inputs in INPUTS]


def from_threads(model: nn.Module, rounds: int) -> list[list[Tensor]]:
    """What every thread gets for all inputs, each beginning with another one, all at the same moment."""
    barrier = threading.Barrier(THREADS)

    def run(first: int) -> list[Tensor]:
        torch.set_num_threads(1)
        found: dict[int, Tensor] = {}
        barrier.wait()
        with torch.no_grad():
            for _ in range(rounds):
                for index in range(len(INPUTS)):
                    place = (first + index) % len(INPUTS)
                    output = model(INPUTS[place])
                    assert torch.equal(found.setdefault(place, output), output)
        return [found[place] for place in range(len(INPUTS))]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@pytest.mark.slow
@pytest.mark.parametrize("has_run", [True, False], ids=["after a call", "at the first call"])
@pytest.mark.parametrize("make", [convert, lambda prepared: prepared], ids=["converted", "prepared"])
def test_threads_get_what_one_gets(make: Callable[[nn.Module], nn.Module], has_run: bool) -> None:
    expected, model = outputs(convert(trained())), make(trained())
    if has_run:
        outputs(model)
    for given in from_threads(model, rounds=3):
        assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))


@pytest.mark.slow
def test_the_first_calls_of_many_models() -> None:
    """What the first call makes is made by eight threads at the same moment, several times over."""
    prepared = trained()
    expected = outputs(convert(prepared))
    for _ in range(5):
        for given in from_threads(convert(prepared), rounds=1):
            assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))
