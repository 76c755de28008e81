"""The promise, on the zoo: the prepared model in evaluation, the converted one and the file in ONNX Runtime give the
same codes in every layer, and nothing of it runs in float."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from example_networks import OF_SAME_BLOCKS
from export.exported_file import session_of
from mlframework.quantization import (
    QATConfig,
    compare_outputs,
    convert,
    export_onnx,
    preparation_report,
    prepare,
    verify,
)
from zoo import FULL_SIZE, NETWORKS, Network, resnet18, roughen_batch_norms, train_steps, zero_some_gammas

pytestmark = pytest.mark.slow

# Built of the blocks of another one, or long to run: in the long tests.
LIKE_OTHERS = OF_SAME_BLOCKS | {"transformers_gpt2", "transformers_convnext", "transformers_bert"}


def networks(fully_integer: bool) -> list[Any]:
    return [
        pytest.param(name, marks=pytest.mark.long if name in LIKE_OTHERS else ())
        for name, network in NETWORKS.items()
        if network.fully_integer == fully_integer
    ]


FULLY_INTEGER, PARTLY_FLOAT = networks(True), networks(False)
SOME_NETWORKS = ("resnet20", "unet", "vit")  # for what every network is put to in the long tests
BATCHES, BATCH_SIZE = 8, 128  # 1,024 inputs


class Deployed(NamedTuple):
    network: Network
    prepared: nn.Module
    path: Path


@cache
def deployed(name: str, seed: int, folder: Path) -> Deployed:
    """Ten steps of quantization-aware training, with batch norms whose gammas are negative and zero; exported."""
    network = NETWORKS[name]
    model = network.make(seed)
    roughen_batch_norms(model, seed)
    prepared = prepare(model, QATConfig(), network.example_inputs(2))
    train_steps(prepared, network, steps=10, seed=seed)
    zero_some_gammas(prepared, seed)
    path = folder / f"{name}-{seed}.onnx"
    export_onnx(prepared.eval(), network.example_inputs(2), path)
    return Deployed(network, prepared, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployed")


@pytest.mark.parametrize("name", FULLY_INTEGER)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
@pytest.mark.filterwarnings("ignore:ONNX Runtime's plain session differs:UserWarning")  # where it saturates
def test_not_one_code_differs(name: str, seed: int, folder: Path) -> None:
    network, prepared, path = deployed(name, seed, folder)
    assert not preparation_report(prepared).left_float
    batches = [network.example_inputs(BATCH_SIZE, 1 + index) for index in range(BATCHES)]
    report = verify(prepared, batches, path=path)
    shown = [layer for layer in report.layers if layer.exported is not None]
    assert len(shown) >= len(report.layers) - 1  # the last layer's value bears the output's name
    assert report.layers[-1].exported is not None
    assert report.layers[-1].exported.elements >= BATCHES * BATCH_SIZE


@pytest.mark.parametrize(
    "name",
    [name if name in SOME_NETWORKS else pytest.param(name, marks=pytest.mark.long) for name in NETWORKS],
)
def test_exact_products_change_nothing(name: str, folder: Path) -> None:
    """Every file loads in a plain session and in an exact one, which computes the codes on any processor."""
    network, prepared, path = deployed(name, 0, folder)
    for exact in (False, True):
        session_of(path.read_bytes(), exact)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    report = compare_outputs(prepared, [network.example_inputs(BATCH_SIZE, 1)], path=path, session_options=options)
    assert all(layer.exported_saturating is None for layer in report.layers)
    assert report.agrees or not network.fully_integer


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize("name", FULLY_INTEGER)
def test_onnx_runtime_leaves_nothing_in_float(name: str, exact: bool, folder: Path, tmp_path: Path) -> None:
    path = deployed(name, 0, folder).path
    session_of(path.read_bytes(), exact, optimized=tmp_path / "optimized.onnx")
    operators = Counter(node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node)
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "ConvTranspose"} & set(
        operators
    )
    assert operators["QuantizeLinear"] == 1  # of the input
    assert operators["QLinearConv"] + operators["QGemm"] > 0


@pytest.mark.parametrize("name", PARTLY_FLOAT)
def test_networks_that_are_partly_float(name: str, folder: Path) -> None:
    """Float sums are formed in another order by ONNX Runtime, and a code may then be the next; errors do not grow."""
    network, prepared, path = deployed(name, 0, folder)
    report = compare_outputs(prepared, [network.example_inputs(32, seed) for seed in (1, 2)], path=path)
    assert all(layer.converted.differing == 0 for layer in report.layers)
    for layer in report.layers:
        assert (
            layer.exported is None
            or layer.exported.differing <= 0.02 * layer.exported.elements
            or layer.compared == "floats"
        )
    floats = preparation_report(prepared).left_float
    assert floats
    assert all(entry.detail for entry in floats)


@pytest.mark.long  # of a small network in export/test_file.py
def test_the_files_of_resnet18_are_a_quarter(tmp_path: Path) -> None:
    """Of half its width, a quarter of its weights: what a file has beside these weighs more."""
    network = FULL_SIZE["resnet18_cifar"]
    model = resnet18(width=32, classes=10, small_images=True)
    prepared = prepare(model, QATConfig(), network.example_inputs(1))
    prepared(*network.example_inputs(2))
    converted = convert(prepared.eval())
    torch.save(model.state_dict(), tmp_path / "float.pt")
    torch.save(converted.state_dict(), tmp_path / "int8.pt")
    export_onnx(converted, network.example_inputs(1), tmp_path / "int8.onnx")
    size = (tmp_path / "float.pt").stat().st_size
    assert (tmp_path / "int8.pt").stat().st_size <= 0.27 * size
    assert (tmp_path / "int8.onnx").stat().st_size <= 0.27 * size


def test_codes_are_the_same_without_vnni(folder: Path, tmp_path: Path) -> None:
    """oneDNN held to AVX2, where its products saturate, and our own kernels put aside: the exact fallback."""
    network, prepared, _ = deployed("resnet20", 0, folder)
    inputs = network.example_inputs(16, 5)
    converted = convert(prepared)
    torch.save((converted, inputs), tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "from mlframework.quantization.kernels import onednn_is_exact, reference_kernels\n"
        "model, inputs = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(), reference_kernels():\n"
        "    torch.save((onednn_is_exact(), model(*inputs)), sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pt"), str(tmp_path / "result.pt")],
        check=True,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    exact, result = torch.load(tmp_path / "result.pt")
    assert not exact
    with torch.no_grad():
        assert torch.equal(result, converted(*inputs))
