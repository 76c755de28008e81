"""Neither training nor conversion keeps anything: memory, live objects and hooks are constant once they have begun."""

from __future__ import annotations

import ctypes
import gc
import linecache
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import QATConfig, convert, prepare

pytestmark = pytest.mark.slow

INPUTS = torch.randn(4, 2, 4, 4)
# What caches still take in: 20 kB in 3,000 conversions; 100 bytes a time would be 300 kB.
ALLOCATED_BOUND = 2**17
CONFIGS = pytest.mark.parametrize("config", [QATConfig(), QATConfig(learnable=True)], ids=["observed", "learned"])


class Live(NamedTuple):
    """What the process holds."""

    tensors: int
    modules: int
    hooks: int
    classes: int
    sources: int
    allocated: int


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    ]  # fmt: skip


def allocated() -> int:
    """Bytes in use, as glibc counts them: it keeps more of the process, which comes and goes; 0 with another libc."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def live() -> Live:
    gc.collect()
    objects = gc.get_objects()
    types = [type(found) for found in objects]  # isinstance would ask __class__, which warns of what is deprecated
    modules = [found for found, kind in zip(objects, types, strict=True) if issubclass(kind, nn.Module)]
    return Live(
        sum(issubclass(kind, Tensor) for kind in types),
        len(modules),
        sum(len(hooks) for found in modules for name, hooks in vars(found).items() if name.endswith("_hooks")),
        sum(issubclass(kind, type) for kind in types),
        len(linecache.cache),  # the sources of generated forwards
        allocated(),
    )


def assert_constant(act: Callable[[], object], times: int) -> None:
    for _ in range(20):
        act()
    before = live()
    for _ in range(times):
        act()
    after = live()
    # A few objects come and go with what a step has cached; what is kept would be one a time at least.
    assert all(now - earlier < 10 for now, earlier in zip(after[:-1], before[:-1], strict=True)), (before, after)
    assert after.allocated - before.allocated < ALLOCATED_BOUND


def prepared_model(config: QATConfig) -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.GELU()]
    prepared = prepare(nn.Sequential(*layers, nn.Linear(8, 2)), config, (INPUTS,))
    prepared(INPUTS)
    return prepared


def training_step(model: nn.Module) -> Callable[[], object]:
    """With an evaluation, as a loop has them now and then."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model.train()(INPUTS).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            model.eval()(INPUTS)

    return step


def conversion(model: nn.Module) -> Callable[[], object]:
    def convert_and_run() -> None:
        with torch.no_grad():
            convert(model)(INPUTS)

    return convert_and_run


@CONFIGS
def test_150_training_steps_keep_nothing(config: QATConfig) -> None:
    assert_constant(training_step(prepared_model(config)), 150)


def test_30_conversions_keep_nothing() -> None:
    assert_constant(conversion(prepared_model(QATConfig())), 30)


@pytest.mark.long
@CONFIGS
def test_3000_training_steps_keep_nothing(config: QATConfig) -> None:
    assert_constant(training_step(prepared_model(config)), 3000)


@pytest.mark.long
def test_3000_conversions_keep_nothing() -> None:
    assert_constant(conversion(prepared_model(QATConfig())), 3000)
