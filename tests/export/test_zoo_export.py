"""Every network of the zoo as a file: those that are fully integer to the last integer, and with nothing left float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.exported_file import FLOAT_COMPUTATION, ExportedFile
from mlframework.quantization import QATConfig, prepare
from zoo import NETWORKS, roughen_batch_norms, train_steps, zero_some_gammas

pytestmark = pytest.mark.slow

INTEGER_NETWORKS = [name for name, network in NETWORKS.items() if network.fully_integer]
OTHERS = [name for name in NETWORKS if name not in INTEGER_NETWORKS]


def exported(name: str, seed: int, folder: Path) -> ExportedFile:
    """After some training, with batch normalization scales of every sign, zero among them."""
    network = NETWORKS[name]
    model = network.make(seed)
    roughen_batch_norms(model)
    torch.manual_seed(seed)
    prepared = prepare(model, QATConfig(), network.example_inputs(2))
    train_steps(prepared, network, steps=5)
    zero_some_gammas(prepared)
    return ExportedFile(prepared.eval(), network.example_inputs(2), folder)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", INTEGER_NETWORKS)
def test_integer_networks(name: str, seed: int, tmp_path: Path) -> None:
    file = exported(name, seed, tmp_path)
    for part in range(4):
        differing, compared = file.differences(*NETWORKS[name].example_inputs(250, seed=100 + part))
        assert differing == {}
        assert compared >= 2
    kinds = file.optimized_kinds()
    assert not FLOAT_COMPUTATION & set(kinds)
    assert kinds["QuantizeLinear"] == 1  # the input


@pytest.mark.parametrize("name", OTHERS)
def test_networks_with_float_parts(name: str, tmp_path: Path) -> None:
    """Normalization, attention and softmax are computed in floats, whose sums no two libraries round alike: where a
    value lies on a boundary between two codes, the codes part by one step, and what follows with them."""
    file = exported(name, 0, tmp_path)
    inputs = NETWORKS[name].example_inputs(64, seed=100)
    differing, compared = file.differences(*inputs)
    codes = file.codes(*inputs)
    assert compared >= 20
    total = sum(codes[layer].size for layer in codes if layer in dict(file.converted.named_modules()))
    assert sum(count for layer, count in differing.items() if not layer.startswith("result")) < 1e-3 * total
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm"} & set(file.optimized_kinds())
