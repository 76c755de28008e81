"""Which GPUs the kernels run on, and what is said of one that goes without; by a PyTorch that pretends to have it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from mlframework.quantization import kernels
from mlframework.quantization.kernels.triton_gpu import availability


@pytest.fixture
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A PyTorch for CUDA with one GPU, a recent one, which nobody has asked for yet."""
    monkeypatch.setattr(availability, "_known", {})
    monkeypatch.setattr(availability._State, "has_warned", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return


def test_there_is_none_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert not availability.runs_on(-1)
    assert kernels.active_path("cuda") == "reference"


@pytest.mark.usefixtures("_a_gpu")
def test_a_recent_gpu() -> None:
    assert kernels.active_path("cuda") == "triton"
    assert kernels.active_path("cuda:0") == "triton"
    with kernels.reference_kernels():
        assert kernels.active_path("cuda") == "reference"
    assert kernels.active_path("meta") == "reference"


@pytest.mark.usefixtures("_a_gpu")
@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("triton", None, "the package triton cannot be imported"),
        ("capability", (7, 5), r"its compute capability is 7\.5, and they need 8\.0"),
        ("cuda", None, "they are written for NVIDIA"),
    ],
)
def test_one_without_kernels_is_warned_of_once(
    attribute: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attribute == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: value)
    elif attribute == "triton":
        monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    else:
        monkeypatch.setattr(torch.version, attribute, value)
    with pytest.warns(RuntimeWarning, match=f"do not run on Test GPU: {reason}"):
        assert kernels.active_path("cuda") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.active_path("cuda") == "reference"
        assert kernels.active_path("cuda:0") == "reference"


@pytest.mark.skipif(availability.is_interpreter(), reason="Triton's interpreter is here")
def test_without_the_interpreter_nothing_is_interpreted() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), kernels.interpreted_kernels():
        pass


def test_a_compiler_knows_the_answer_while_it_traces() -> None:
    def doubled_where_there_are_kernels(values: torch.Tensor) -> torch.Tensor:
        return values * 2 if availability.runs_on(-1) else values * 3

    compiled = torch.compile(doubled_where_there_are_kernels, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), doubled_where_there_are_kernels(torch.ones(2)))


WITHOUT_TRITON = """
import subprocess
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import torch
from mlframework.quantization import QATConfig, convert, prepare
from mlframework.quantization.kernels.operators.declaration import DECLARED

model = prepare(torch.nn.Linear(4, 3), QATConfig(), (torch.randn(2, 4),))
for _ in range(2):
    model(torch.randn(2, 4)).sum().backward()
print(convert(model.eval())(torch.randn(2, 4)).shape, any(operator.on_gpu for operator in DECLARED.values()))
"""


@pytest.mark.slow
def test_without_triton_nothing_changes() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([2, 3]) False"
