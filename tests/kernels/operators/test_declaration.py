"""Every declared operator keeps to its schema, and its fake form and its reference are true to what is compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from example_operators import LABELS, SUMS, assert_same, assert_same_layout, samples, tensors_of
from mlframework.quantization import kernels
from mlframework.quantization.kernels.operators.declaration import DECLARED, NAMESPACE

needs_kernels = pytest.mark.skipif(kernels.active_path() != "native", reason="needs compiled kernels")
EVERY_SAMPLE = pytest.mark.parametrize(("name", "label"), LABELS)

# What packing makes is read by the compiled kernels alone.
WITHOUT_REFERENCE = {"pack_layer", "packed_layer"}
# Packing takes place before there is a graph, since its result depends on the processor. Hashes are numbers that are
# read from what tensors hold, which no graph knows.
WITHOUT_FAKE_FORM = {"pack_layer", "fingerprints"}
# The hash of a shape is Python's there, and the compiled kernels have their own.
WITH_OWN_VALUES = {"fingerprints"}
# The copy of a state and the refusal are operators for compilers alone, and such a layer is for GPUs.
NOT_ON_A_CPU = {"snapshot", "refuse_recomputation", "folded_layer"}


def one_of_each(kind: Callable[[Any], Any]) -> list[tuple[str, str]]:
    """Of the calls whose arguments are of the same kinds, one each."""
    chosen: dict[Any, tuple[str, str]] = {}
    for name, label in LABELS:
        if name not in WITHOUT_FAKE_FORM:
            chosen.setdefault((name, *map(kind, samples(name)[label])), (name, label))
    return list(chosen.values())


def kind_of(argument: Any) -> Any:
    """What is compiled once serves all of the same dtypes, dimensions and options."""
    return (argument.dtype, argument.dim()) if isinstance(argument, Tensor) else type(argument)


def dtype_of(argument: Any) -> Any:
    return argument.dtype if isinstance(argument, Tensor) else type(argument)


OF_EACH_DTYPE = set(one_of_each(dtype_of))
# Those of other dimensions in the long tests: what differs with these, tests without a compiler see.
OF_EACH_DTYPE_FIRST = pytest.mark.parametrize(
    ("name", "label"),
    [
        pytest.param(*sample, marks=[] if sample in OF_EACH_DTYPE else pytest.mark.long)
        for sample in one_of_each(kind_of)
    ],
)

# A compiler calls all of an operator's samples alike; how it dispatches each dtype is tested apart.
OF_EACH_OPERATOR_FIRST = pytest.mark.parametrize(
    ("name", "label"),
    [
        pytest.param(*sample, marks=[] if is_first else pytest.mark.long)
        for _, of_one in itertools.groupby(one_of_each(kind_of), key=lambda sample: sample[0])
        for is_first, sample in zip(itertools.chain([True], itertools.repeat(False)), of_one, strict=False)
    ],
)


def test_every_operator_has_samples() -> None:
    assert {name for name, _ in LABELS} == set(DECLARED)


def test_names_of_exceptions_are_operators() -> None:
    assert set(DECLARED) >= WITHOUT_REFERENCE | WITHOUT_FAKE_FORM | WITH_OWN_VALUES | NOT_ON_A_CPU | set(SUMS)
    without = {name for name, operator in DECLARED.items() if operator.reference is operator.overload}
    assert without == WITHOUT_REFERENCE


@needs_kernels
@pytest.mark.slow
@EVERY_SAMPLE
def test_schema_and_fake_form(name: str, label: str) -> None:
    """Nothing changes but what the schema says, no result is an argument, and fake results lie as real ones do."""
    checks = ["test_schema", "test_autograd_registration"]
    if name not in WITHOUT_FAKE_FORM:
        checks.append("test_faketensor")
    opcheck(DECLARED[name].overload, samples(name)[label], test_utils=checks)


@needs_kernels
@pytest.mark.slow
@OF_EACH_DTYPE_FIRST
def test_dispatch_by_a_compiler(name: str, label: str) -> None:
    """With sizes that are symbols. (It takes no NaN for equal to another.)"""
    opcheck(DECLARED[name].overload, samples(name)[label], test_utils="test_aot_dispatch_dynamic")


@needs_kernels
@pytest.mark.parametrize(
    ("name", "label"), [sample for sample in LABELS if sample[0] not in WITHOUT_REFERENCE | WITH_OWN_VALUES]
)
def test_the_reference_gives_the_same(name: str, label: str) -> None:
    operator = DECLARED[name]
    arguments = samples(name)[label]
    actual = tensors_of(operator, operator.overload(*arguments), arguments)
    torch.manual_seed(0)
    arguments = samples(name)[label]
    with kernels.reference_kernels():
        expected = tensors_of(operator, operator(*arguments), arguments)
    assert len(actual) == len(expected)
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_same(one, other, SUMS.get(name, {}).get(index, 0.0))
        if one is not None:
            assert_same_layout(one, other)


@needs_kernels
@pytest.mark.slow
@OF_EACH_OPERATOR_FIRST
def test_compiled_functions_call_it(name: str, label: str) -> None:
    torch.compiler.reset()  # or all these are one function that is compiled too often
    operator = DECLARED[name]
    call: Callable[..., Any] = operator.overload if name in NOT_ON_A_CPU else operator

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(*arguments: Any) -> Any:
        return call(*arguments)

    arguments = samples(name)[label]
    actual = tensors_of(operator, run(*arguments), arguments)
    torch.manual_seed(0)
    arguments = samples(name)[label]
    expected = tensors_of(operator, operator(*arguments), arguments)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)


class Calls(TorchDispatchMode):
    """Which of the library's operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@needs_kernels
@pytest.mark.parametrize("name", [name for name in DECLARED if name not in WITHOUT_REFERENCE])
def test_the_reference_can_be_forced(name: str) -> None:
    call: Any = kernels.fingerprints if name == "fingerprints" else DECLARED[name]  # which takes a list
    for arguments in samples(name).values():
        with kernels.reference_kernels(), Calls() as calls:
            call(*arguments)
        assert not calls.names
    with Calls() as calls:
        call(*arguments)
    assert calls.names == (set() if name in NOT_ON_A_CPU else {name})


@pytest.mark.parametrize("name", [name for name in DECLARED if DECLARED[name].mutated and name not in NOT_ON_A_CPU])
@pytest.mark.parametrize("path", ["native", "reference"])
def test_others_see_what_has_changed(name: str, path: str) -> None:
    operator = DECLARED[name]
    for label, arguments in samples(name).items():
        if "unobserved" in label or "not due" in label:
            continue
        changed = [arguments[index] for index in operator.mutated if arguments[index] is not None]
        versions = [tensor._version for tensor in changed]
        if path == "native":
            operator(*arguments)
        else:
            with kernels.reference_kernels():
                operator(*arguments)
        assert all(tensor._version > version for tensor, version in zip(changed, versions, strict=True))


def test_a_real_tensor_and_one_of_no_values_are_refused() -> None:
    """PyTorch takes the form on fake tensors for them, whose results would be memory as it was."""
    codes, scale, *others = samples("dequantize")["contiguous"]
    with pytest.raises(RuntimeError, match="dequantize must have all tensors on one device, got cpu and meta"):
        DECLARED["dequantize"](codes, scale.to("meta"), *others)


@needs_kernels
def test_which_tensors_it_takes() -> None:
    operator = DECLARED["fake_quantize"]
    values = torch.randn(4, 5)
    for dtype in (torch.float32, torch.bfloat16):
        assert operator.has_kernel(values.to(dtype))
    for dtype in (torch.float16, torch.float64):
        assert not operator.has_kernel(values.to(dtype))
    assert operator.has_kernel(torch.nn.Parameter(values))
    assert not operator.has_kernel(values.to("meta"))
    mapped = torch.vmap(lambda row: torch.tensor(operator.has_kernel(row)))(values)
    assert not mapped.any()
