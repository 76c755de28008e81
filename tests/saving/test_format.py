"""Files of format 1 go on loading: one that was written when the format was made gives the codes that it gave then."""

from __future__ import annotations

from pathlib import Path

import torch

from mlframework.quantization import load
from saved_files import Residual

FILE = Path(__file__).parent / "format_1.safetensors"

# Of integer sums, and so to the last bit: float32 numbers as Python prints them.
EXPECTED = [[-0.5423531532287598, -0.047482553869485855], [-0.8250510692596436, 0.015488263219594955]]


def test_a_file_of_the_first_format_loads_and_computes_what_it_did() -> None:
    inputs = torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4)
    assert load(FILE, Residual())(inputs).logits.tolist() == EXPECTED
